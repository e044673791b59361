//! A server that outlives the command that started it, as `devkit up` needs. It has no guardian: it runs until it is stopped.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, anyhow};

use super::data::Files;
use super::{ClusterOptions, account, admin};

/// A persistent server in a folder, running or not. Methods that are not async block.
#[derive(Debug)]
pub struct Detached {
    files: Files,
}

impl Detached {
    /// Creates the files if needed, starts the server with `pg_ctl`, and waits until it accepts connections.
    ///
    /// The options must give the folder and the port.
    ///
    /// # Errors
    /// If the options lack the folder or the port, the port is taken, or the server does not start; the error includes its last lines of
    /// log.
    pub fn start(options: &ClusterOptions) -> Result<Self> {
        let (Some(_), Some(port)) = (&options.folder, options.port) else {
            return Err(anyhow!("a detached Postgres needs a folder and a port"));
        };
        let server = Self { files: Files::prepare(options)? };
        if !server.alive() {
            let files = &server.files;
            options.write(&files.data(), port, files.account.as_ref())?;
            let log = files.log();
            server
                .control("start", &["-l".as_ref(), log.as_os_str()])
                .map_err(|_| anyhow!("Postgres did not start: {}", files.log_tail()))?;
        }
        Ok(server)
    }

    /// The server in this folder; `None` if none was ever created there.
    ///
    /// # Errors
    /// If there are no server binaries.
    pub fn at(folder: &Path) -> Result<Option<Self>> {
        Ok(Files::existing(folder)?.map(|files| Self { files }))
    }

    /// The port of the server; `None` if it is not running.
    #[must_use]
    pub fn running(&self) -> Option<u16> {
        let port = self.files.status()?.port;
        self.alive().then_some(port)
    }

    /// Stops the server and waits until it is gone. Does nothing if it is not running.
    ///
    /// # Errors
    /// If it does not stop.
    pub fn stop(&self) -> Result<()> {
        if self.alive() { self.control("stop", &["-m".as_ref(), "fast".as_ref()]) } else { Ok(()) }
    }

    /// Removes all files of a server that is stopped. Returns their folder.
    ///
    /// # Errors
    /// If they can't be removed.
    pub fn remove(self) -> Result<PathBuf> {
        let folder = self.files.folder;
        std::fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
        Ok(folder)
    }

    fn alive(&self) -> bool {
        self.control("status", &[]).is_ok()
    }

    /// The URL of a database, as the superuser; `None` if the server is not running.
    #[must_use]
    pub fn url(&self, database: &str) -> Option<String> {
        Some(format!("postgres://postgres@127.0.0.1:{}/{database}", self.running()?))
    }

    /// The URL of a database, which is created if it does not exist.
    ///
    /// # Errors
    /// If the server is not running or does not answer.
    pub async fn database(&self, name: &str) -> Result<String> {
        let address = |name| self.url(name).ok_or_else(|| anyhow!("Postgres does not run"));
        admin::create_if_missing(&address("postgres")?, name).await?;
        address(name)
    }

    /// A note for the developer; `None` if the data is in the requested folder.
    #[must_use]
    pub fn note(&self) -> Option<&str> {
        self.files.note.as_deref()
    }

    fn control(&self, action: &str, arguments: &[&std::ffi::OsStr]) -> Result<()> {
        let files = &self.files;
        let status = account::command(&files.binaries.program("pg_ctl"), files.account.as_ref(), &files.folder)
            .args([action, "-w", "-D"])
            .arg(files.data())
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .context("running pg_ctl")?;
        if status.success() { Ok(()) } else { Err(anyhow!("pg_ctl {action} failed")) }
    }
}
