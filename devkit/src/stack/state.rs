//! The record of what is running (`state.json`), and how a process is told apart from another one with the same ID.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::folder;

/// One background process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Running {
    /// `api`, `worker` or `upstream`.
    pub(crate) name: String,
    /// Its process ID.
    pub(crate) pid: u32,
    /// When it started, as the system reports it: process IDs are reused, start times are not.
    pub(crate) started: String,
}

/// The stack, as started by `up`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// In the order in which they were started.
    pub(crate) processes: Vec<Running>,
    /// Address of the API.
    pub(crate) api_url: String,
    /// Address of the worker.
    pub(crate) worker_url: String,
    /// Address of the simulated upstream.
    pub(crate) upstream_url: String,
    /// Address of the database.
    pub(crate) database_url: String,
}

impl State {
    /// Loads the record that `up` has saved; `None` if there is none that can be used.
    pub(crate) fn load() -> Result<Option<Self>> {
        let path = path()?;
        match std::fs::read(&path) {
            // A file that cannot be parsed is from another version, or half written because the machine went down.
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("reading {}", path.display())),
        }
    }

    /// Saves the record, entirely or not at all.
    pub(super) fn save(&self) -> Result<()> {
        let path = path()?;
        let new = path.with_extension("new");
        let text = serde_json::to_vec_pretty(self).expect("it has string keys only");
        std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &path)).with_context(|| format!("writing {}", path.display()))
    }

    /// Removes the record.
    pub(super) fn remove() -> Result<()> {
        let path = path()?;
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("removing {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Returns whether all processes are still running.
    pub(crate) fn runs(&self) -> bool {
        !self.processes.is_empty() && self.processes.iter().all(Running::runs)
    }
}

impl Running {
    /// Returns whether the process with this ID is still the one that was started.
    pub(super) fn runs(&self) -> bool {
        start_of(self.pid).is_some_and(|started| started == self.started)
    }
}

fn path() -> Result<PathBuf> {
    Ok(folder()?.join("state.json"))
}

/// The start of a process, as a text that no other process with its ID ever has; `None` if it has ended.
pub(super) fn start_of(pid: u32) -> Option<String> {
    if let Ok(boot) = std::fs::read_to_string("/proc/sys/kernel/random/boot_id") {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        return start_in_stat(&stat).map(|ticks| format!("{} {ticks}", boot.trim()));
    }
    // Not Linux.
    let output = Command::new("ps").args(["-o", "lstart=", "-p", &pid.to_string()]).env("LC_ALL", "C").output().ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (!text.is_empty()).then_some(text)
}

/// Field 22 of `/proc/PID/stat`, unless field 3 says that the process is dead. The second field can contain anything, even `) `.
fn start_in_stat(stat: &str) -> Option<&str> {
    let mut fields = stat.rsplit_once(") ")?.1.split_whitespace();
    let state = fields.next()?;
    fields.nth(18).filter(|_| !matches!(state, "Z" | "X"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_and_a_dead_one_does_not_run() {
        let stat = |state| format!("12 (a ) b) {state} 1 12 12 0 -1 4194304 88 0 0 0 0 0 0 0 20 0 1 0 4242 2752512 190\n");
        assert_eq!(start_in_stat(&stat("S")), Some("4242"));
        assert_eq!(start_in_stat(&stat("Z")), None);
        assert_eq!(start_in_stat("nonsense"), None);
    }

    #[test]
    fn a_number_that_was_given_out_again_is_not_the_same_process() {
        let pid = std::process::id();
        let me = Running { name: "test".into(), pid, started: start_of(pid).unwrap() };
        assert!(me.runs());
        assert!(!Running { started: "another start".into(), ..me }.runs());
    }
}
