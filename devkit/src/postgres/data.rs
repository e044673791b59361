//! The files of a cluster: created once, and read for the status of the server.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, anyhow};

use super::account::{self, Account, Place};
use super::{Binaries, ClusterOptions, Durability, options};

/// The files of one cluster, ready for a server.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) binaries: Binaries,
    pub(super) account: Option<Account>,
    /// Holds the data and the log.
    pub(super) folder: PathBuf,
    pub(super) note: Option<String>,
    pub(super) temporary: bool,
}

impl Files {
    /// The files in the given folder, or in a temporary folder if none is given. Creates them if they do not exist.
    pub(super) fn prepare(options: &ClusterOptions) -> Result<Self> {
        let folder = options.folder.as_deref();
        let binaries = Binaries::find()?;
        let account = Account::needed()?;
        let place = match folder {
            Some(folder) => account::persistent_folder(folder, account.as_ref())?,
            None => Place { folder: account::temporary_folder(account.as_ref())?, note: None },
        };
        let files = Self { binaries, account, folder: place.folder, note: place.note, temporary: folder.is_none() };
        if !files.data().join(COMPLETE).exists() {
            let made = match options.standby_of {
                Some(primary) => files.copy(primary),
                None => files.initialise(options.durability),
            };
            made.inspect_err(|_| files.remove_temporary())?;
        }
        Ok(files)
    }

    /// The files that an earlier command created in the folder; `None` if there are none.
    pub(super) fn existing(folder: &Path) -> Result<Option<Self>> {
        let account = Account::needed()?;
        let folder = account::chosen_folder(folder, account.as_ref())?;
        if !folder.join("data").join(COMPLETE).exists() {
            return Ok(None);
        }
        Ok(Some(Self { binaries: Binaries::find()?, account, folder, note: None, temporary: false }))
    }

    /// The data folder of Postgres.
    pub(super) fn data(&self) -> PathBuf {
        self.folder.join("data")
    }

    /// The server's log.
    pub(super) fn log(&self) -> PathBuf {
        self.folder.join("postgres.log")
    }

    /// Runs `initdb`, after removing what an interrupted run left.
    fn initialise(&self, durability: Durability) -> Result<()> {
        let data = self.data();
        if data.exists() {
            std::fs::remove_dir_all(&data).with_context(|| format!("removing {}", data.display()))?;
        }
        let mut command = account::command(&self.binaries.program("initdb"), self.account.as_ref(), &self.folder);
        command.args(["--auth=trust", "--username=postgres", "--encoding=UTF8", "--locale=C", "-D"]).arg(&data);
        if durability == Durability::Relaxed {
            command.arg("--no-sync");
        }
        run(command, "initdb")?;
        options::include(&data)?;
        self.complete()
    }

    /// Runs `pg_basebackup`: copies the data of a running server, set up to follow it as a standby.
    fn copy(&self, primary: u16) -> Result<()> {
        let mut command = account::command(&self.binaries.program("pg_basebackup"), self.account.as_ref(), &self.folder);
        command.args(["--host=127.0.0.1", "--username=postgres", "--checkpoint=fast", "--no-sync", "--write-recovery-conf"]);
        command.arg(format!("--port={primary}")).arg("-D").arg(self.data());
        run(command, "pg_basebackup")?;
        self.complete()
    }

    /// Marks the data as complete.
    fn complete(&self) -> Result<()> {
        let complete = self.data().join(COMPLETE);
        std::fs::write(&complete, "").with_context(|| format!("writing {}", complete.display()))?;
        account::give(&complete, self.account.as_ref())
    }

    /// The end of the log, for an error message.
    pub(super) fn log_tail(&self) -> String {
        let text = std::fs::read(self.log()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().rev().take(4).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }

    /// Removes the folder if it is temporary.
    pub(super) fn remove_temporary(&self) {
        if self.temporary {
            // Best effort: another error is already being reported.
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }

    /// The status that the running server has written; `None` if there is none.
    pub(super) fn status(&self) -> Option<Status> {
        Status::read(&self.data())
    }
}

fn run(mut command: std::process::Command, name: &str) -> Result<()> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("running {name}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(anyhow!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

/// The marker file, written last; without it, the data folder is incomplete.
const COMPLETE: &str = "countersign.complete";

/// The contents of `postmaster.pid`, from which `pg_ctl`, too, learns the state of a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    pub(super) server: i32,
    pub(super) port: u16,
    pub(super) ready: bool,
}

impl Status {
    fn read(data: &Path) -> Option<Self> {
        Self::parse(&std::fs::read_to_string(data.join("postmaster.pid")).ok()?)
    }

    /// Parses the lines: process ID, data folder, start time, port, socket folder, address, shared memory, status.
    fn parse(text: &str) -> Option<Self> {
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        let ready = lines.get(7).is_some_and(|status| *status == "ready");
        Some(Self { server: lines.first()?.parse().ok()?, port: lines.get(3)?.parse().ok()?, ready })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_ready_when_its_file_says_so() {
        let starting = "123\n/d\n1700000000\n5433\n\n127.0.0.1\n  5432001   1\nstarting\n";
        assert_eq!(Status::parse(starting), Some(Status { server: 123, port: 5433, ready: false }));
        let ready = starting.replace("starting", "ready   ");
        assert!(Status::parse(&ready).unwrap().ready);
        assert_eq!(Status::parse("123\n/d\n"), None);
        assert_eq!(Status::parse(""), None);
    }
}
