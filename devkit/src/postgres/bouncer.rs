//! PgBouncer in front of a server, in transaction pooling mode: each transaction may run in a different session of Postgres.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use nix::unistd::geteuid;
use tempfile::TempDir;

use crate::ports::free_port;
use crate::processes::Process;

/// How long it may take to start.
const START_BOUND: Duration = Duration::from_secs(20);

/// Server sessions per database; few, so that clients have to share them.
const SESSIONS: u16 = 4;

/// A running PgBouncer. Dropping it stops it.
#[derive(Debug)]
pub struct Bouncer {
    port: u16,
    _process: Process,
    _settings: TempDir,
}

impl Bouncer {
    /// The path of the program; `None` if it is not installed.
    #[must_use]
    pub fn program() -> Option<PathBuf> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        // Distributions keep it out of an ordinary user's PATH.
        let folders = std::env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
        folders.map(|folder| folder.join("pgbouncer")).find(|program| program.is_file())
    }

    /// Starts it in front of the server on this port of 127.0.0.1.
    ///
    /// Apart from addresses and authentication, it differs from the default settings only in the pool mode, the pool size and the limit of
    /// client connections.
    ///
    /// # Errors
    /// If it is not installed or does not start; the error includes the end of its log.
    pub async fn start(postgres: u16) -> Result<Self> {
        let program = Self::program().ok_or_else(|| anyhow!("no pgbouncer found; install the package `pgbouncer`"))?;
        let folder = tempfile::Builder::new()
            .prefix("countersign-pgbouncer-")
            .permissions(std::os::unix::fs::PermissionsExt::from_mode(0o755))
            .tempdir()
            .context("making a temporary folder")?;
        let port = free_port()?;
        let (settings, users) = (folder.path().join("pgbouncer.ini"), folder.path().join("users.txt"));
        write(&users, "\"postgres\" \"\"\n")?;
        write(
            &settings,
            &format!(
                "[databases]\n* = host=127.0.0.1 port={postgres}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
                unix_socket_dir =\nauth_type = trust\nauth_file = {}\npool_mode = transaction\ndefault_pool_size = {SESSIONS}\n\
                max_client_conn = 500\n",
                users.display()
            ),
        )?;
        // Like Postgres, it refuses to run as root.
        let account: &[&str] = if geteuid().is_root() { &["-u", "nobody"] } else { &[] };
        let settings = settings.display().to_string();
        let process = Process::spawn(&program, account.iter().copied().chain([settings.as_str()]), [])?;
        process.wait_for_log("process up", START_BOUND).await?;
        Ok(Self { port, _process: process, _settings: folder })
    }

    /// The URL of a database through the pooler.
    #[must_use]
    pub fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
}
