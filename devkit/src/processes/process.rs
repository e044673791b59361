//! One child process: started with a clean environment, watched through its log, signalled, waited for, and killed at the end.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use nix::sys::signal;
use nix::unistd::Pid;
use tokio::process::{Child, Command};
use tokio::task::JoinHandle;

use super::log::Log;

/// A signal to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// SIGTERM: shut down gracefully.
    Term,
    /// SIGKILL: end at once.
    Kill,
    /// SIGSTOP: pause, with sockets left open.
    Stop,
    /// SIGCONT: continue.
    Cont,
}

/// The environment variables that a process inherits.
const PASSED: [&str; 5] = ["PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "LLVM_PROFILE_FILE"];

/// A running program. It is bound to the runtime that it was started in, and is killed when it is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: Log,
    /// The tasks that read the outputs. They end when the process closes its outputs, which it does by ending.
    followers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts a program.
    ///
    /// Its environment consists of the given variables, `PATH`, `HOME` and a few other inherited ones, and `RUST_BACKTRACE=1`, so no
    /// setting of the developer's shell changes a test.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn<A: AsRef<OsStr>>(
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
        environment: impl IntoIterator<Item = (String, String)>,
    ) -> Result<Self> {
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let passed = PASSED.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
        let mut child = Command::new(program)
            .args(arguments)
            .env_clear()
            .envs(passed)
            .env("RUST_BACKTRACE", "1")
            .envs(environment)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting {}", program.display()))?;
        let log = Log::new();
        let followers = vec![
            tokio::spawn(log.clone().follow(child.stdout.take().expect("it was asked for as a pipe"))),
            tokio::spawn(log.clone().follow(child.stderr.take().expect("it was asked for as a pipe"))),
        ];
        Ok(Self { name, child, log, followers })
    }

    /// The process ID; `None` once the process has been waited for.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.id()
    }

    /// What the process has printed on both outputs, up to a few megabytes; the oldest lines are dropped first.
    #[must_use]
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// Waits for a line of its log that contains the text, and returns it. Lines printed earlier count.
    ///
    /// # Errors
    /// If there is none within the bound; the error includes the end of the log.
    pub async fn wait_for_log(&self, text: &str, bound: Duration) -> Result<String> {
        tokio::time::timeout(bound, self.log.line_with(text)).await.map_err(|_| self.late(&format!("`{text}` in the log"), bound))
    }

    /// Sends a signal. Does nothing if the process has ended.
    ///
    /// # Errors
    /// If the system refuses.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()) else { return Ok(()) };
        let signal = match signal {
            Signal::Term => signal::Signal::SIGTERM,
            Signal::Kill => signal::Signal::SIGKILL,
            Signal::Stop => signal::Signal::SIGSTOP,
            Signal::Cont => signal::Signal::SIGCONT,
        };
        // The process has not been waited for, so its ID cannot have been reused.
        signal::kill(Pid::from_raw(pid), signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Waits until the process has ended and its log is complete.
    ///
    /// # Errors
    /// If it has not ended within the bound; the error includes the end of the log.
    pub async fn wait_exit(&mut self, bound: Duration) -> Result<ExitStatus> {
        let ended = async {
            let status = self.child.wait().await;
            for follower in self.followers.drain(..) {
                // A follower that panicked has reported that; what it has read of the log is all there is.
                let _ = follower.await;
            }
            status
        };
        match tokio::time::timeout(bound, ended).await {
            Ok(status) => status.with_context(|| format!("waiting for {}", self.name)),
            Err(_) => Err(self.late("end", bound)),
        }
    }

    /// Sends SIGKILL, and waits until the process is gone.
    ///
    /// # Errors
    /// If the system refuses.
    pub async fn kill(&mut self) -> Result<()> {
        self.child.kill().await.with_context(|| format!("killing {}", self.name))
    }

    fn late(&self, what: &str, bound: Duration) -> Error {
        let log = self.log();
        let lines: Vec<&str> = log.lines().rev().take(12).collect();
        let tail = lines.into_iter().rev().collect::<Vec<_>>().join(" | ");
        anyhow!("{}: no {what} within {bound:?}; its log ends in: {tail}", self.name)
    }
}
