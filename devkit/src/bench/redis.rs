//! A Redis server for the peers that need one: with its append-only file on, in a temporary folder, on a free port.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::Serialize;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

use crate::ports::free_port;
use crate::wait::within;

/// When acknowledged writes of Redis are forced to disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Fsync {
    /// Within about a second, as `BullMQ` recommends. A crash loses the writes acknowledged in that time.
    Everysec,
    /// Before they are acknowledged, as ours are.
    Always,
}

impl Fsync {
    /// Both values.
    pub(super) const ALL: [Self; 2] = [Self::Everysec, Self::Always];

    /// The value for Redis.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Everysec => "everysec",
            Self::Always => "always",
        }
    }
}

/// A running server. Dropping it kills it and removes its files.
#[derive(Debug)]
pub(super) struct Redis {
    port: u16,
    _child: Child,
    _folder: TempDir,
}

const STARTED_WITHIN: Duration = Duration::from_secs(10);

impl Redis {
    /// The version of the program. Fails if it is not installed.
    pub(super) async fn version() -> Result<String> {
        let output = Command::new("redis-server").arg("--version").output().await.context("no redis-server; install `redis-server`")?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.split_whitespace().find_map(|word| word.strip_prefix("v="));
        version.map(str::to_owned).ok_or_else(|| anyhow!("redis-server --version says no version"))
    }

    /// Starts an empty server.
    pub(super) async fn start(fsync: Fsync) -> Result<Self> {
        let (port, folder) = (free_port()?, tempfile::Builder::new().prefix("countersign-redis-").tempdir().context("a folder for Redis")?);
        let child = Command::new("redis-server")
            .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "yes", "--appendfsync", fsync.word()])
            // BullMQ requires that no key is evicted.
            .args(["--maxmemory-policy", "noeviction", "--loglevel", "warning"])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .context("starting redis-server")?;
        let redis = Self { port, _child: child, _folder: folder };
        within(STARTED_WITHIN, async || Ok(redis.command(&["DBSIZE"]).await.is_ok())).await.context("Redis does not answer")?;
        Ok(redis)
    }

    /// The port on 127.0.0.1.
    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Runs a command that answers with a number.
    pub(super) async fn command(&self, words: &[&str]) -> Result<i64> {
        let failed = || format!("{} of Redis", words.join(" "));
        let stream = TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))).await.with_context(failed)?;
        let mut stream = BufReader::new(stream);
        stream.write_all(encode(words).as_bytes()).await.with_context(failed)?;
        let mut line = String::new();
        stream.read_line(&mut line).await.with_context(failed)?;
        line.trim().strip_prefix(':').and_then(|number| number.parse().ok()).ok_or_else(|| anyhow!("{}: {line}", failed()))
    }
}

/// Encodes a command for the Redis protocol.
fn encode(words: &[&str]) -> String {
    words.iter().fold(format!("*{}\r\n", words.len()), |text, word| text + &format!("${}\r\n{word}\r\n", word.len()))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_command_is_a_list_of_words_with_their_lengths() {
        assert_eq!(super::encode(&["LLEN", "a"]), "*2\r\n$4\r\nLLEN\r\n$1\r\na\r\n");
    }
}
