//! Stops a server and removes its temporary files when the process that owns it ends in any way, SIGKILL included. No destructor can
//! guarantee that.
//!
//! A small shell script (`guardian.sh`) starts the server in a process group of its own and reads standard input. The owner holds the other
//! end of that pipe, which the kernel closes when the owner ends. No signal handler, destructor or thread of the owner has to run for it.
//! The script does not survive a SIGKILL of its own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::account::{self, Account};

const SCRIPT: &str = include_str!("guardian.sh");
/// How long a server may take to stop before it is killed.
const STOP_BOUND: Duration = Duration::from_secs(30);

/// What the script has reported.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Report {
    server: Option<i32>,
    exited: bool,
}

#[derive(Debug, Default)]
struct Reports {
    last: Mutex<Report>,
    changed: Condvar,
}

impl Reports {
    fn update(&self, change: impl FnOnce(&mut Report)) {
        change(&mut self.last.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    /// Waits until the condition holds or the bound is reached, and returns the report at that time.
    fn wait(&self, bound: Duration, condition: impl Fn(&Report) -> bool) -> Report {
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let (report, _) = self.changed.wait_timeout_while(last, bound, |report| !condition(report)).unwrap_or_else(PoisonError::into_inner);
        *report
    }
}

/// One run of a server, and the script that watches it.
#[derive(Debug)]
pub(super) struct Guardian {
    script: Child,
    commands: Option<ChildStdin>,
    reports: Arc<Reports>,
}

/// The parameters of a guardian.
#[derive(Clone, Copy, Debug)]
pub(super) struct Charge<'a> {
    pub(super) program: &'a Path,
    pub(super) data: &'a Path,
    pub(super) log: &'a Path,
    /// The folder to remove when the owner is gone; `None` if the files are persistent.
    pub(super) remove: Option<&'a Path>,
    pub(super) account: Option<&'a Account>,
}

impl Guardian {
    /// Starts the server; does not wait until it accepts connections.
    pub(super) fn start(charge: Charge<'_>) -> Result<Self> {
        let Charge { program, data, log, remove, account } = charge;
        let mut script = account::command(Path::new("/bin/sh"), account, data)
            .args(["-c", SCRIPT, "countersign-postgres-guardian"])
            .args([program, data, log, remove.unwrap_or(Path::new(""))])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("starting the shell that watches over Postgres")?;
        let commands = script.stdin.take();
        let output = script.stdout.take().expect("standard output was asked for as a pipe");
        let reports = Arc::new(Reports::default());
        let reader = Arc::clone(&reports);
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(std::result::Result::ok) {
                match line.split_once(' ') {
                    Some(("started", pid)) => reader.update(|report| report.server = pid.parse().ok()),
                    _ => reader.update(|report| report.exited = true),
                }
            }
            reader.update(|report| report.exited = true);
        });
        reports.wait(STOP_BOUND, |report| report.server.is_some() || report.exited);
        Ok(Self { script, commands, reports })
    }

    /// The process ID of the server.
    pub(super) fn server(&self) -> Option<i32> {
        self.reports.wait(Duration::ZERO, |_| true).server
    }

    /// Returns whether the server has ended.
    pub(super) fn exited(&self) -> bool {
        self.reports.wait(Duration::ZERO, |_| true).exited
    }

    /// Stops the server with `fast` or `immediate`, and waits until it is gone. Kills it if that takes too long.
    pub(super) fn stop(&mut self, how: &str) {
        self.say(how);
        let report = self.reports.wait(STOP_BOUND, |report| report.exited);
        if let (false, Some(server)) = (report.exited, report.server) {
            // The server is still a child of the script, which has not waited for it, so its ID cannot have been reused.
            let _ = kill(Pid::from_raw(server), Signal::SIGKILL);
            self.reports.wait(STOP_BOUND, |report| report.exited);
        }
    }

    /// Ends the script and leaves the files in place for the next guardian.
    pub(super) fn release(mut self) {
        self.say("release");
    }

    fn say(&mut self, word: &str) {
        if let Some(commands) = &mut self.commands {
            // If the script is gone, there is nothing left to command.
            let _ = writeln!(commands, "{word}");
        }
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        if !self.exited() && self.commands.is_some() {
            self.stop("fast");
        }
        drop(self.commands.take());
        // The script now ends by itself. Waiting for it makes sure that the files are gone before the owner goes on.
        let _ = self.script.wait();
    }
}
