//! A program that waits for a start command: it prints `ready`, begins when it reads a line from standard input, and ends when standard
//! input ends.
//!
//! So the time to start a program, to connect and to compile is in no figure, ours or a peer's.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Error, Result, anyhow};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, Command};
use tokio::task::JoinHandle;

/// A program to run.
#[derive(Clone, Debug)]
pub(super) struct Program {
    /// The program and its first arguments.
    pub(super) command: Vec<String>,
    /// Its environment variables.
    pub(super) environment: Vec<(String, String)>,
}

impl Program {
    /// A program with arguments.
    pub(super) fn new(command: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { command: command.into_iter().map(Into::into).collect(), environment: Vec::new() }
    }

    /// Adds an environment variable.
    pub(super) fn set(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).args(arguments).env_clear();
        for name in ["PATH", "HOME", "TMPDIR"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command.env("NODE_ENV", "production").stderr(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        command
    }

    /// Runs the program to its end, which must be successful.
    pub(super) async fn run(&self, arguments: &[&str]) -> Result<()> {
        let output = self.command(arguments).stdin(Stdio::null()).output().await.with_context(|| format!("running {}", self.name()))?;
        if output.status.success() { Ok(()) } else { Err(self.failed(&String::from_utf8_lossy(&output.stderr))) }
    }

    /// Starts the program, and waits until it is ready.
    pub(super) async fn start(&self, arguments: &[&str]) -> Result<Driven> {
        let mut child = self.command(arguments).stdin(Stdio::piped()).spawn().with_context(|| format!("starting {}", self.name()))?;
        let stdin = child.stdin.take().expect("it was asked for as a pipe");
        let mut stdout = BufReader::new(child.stdout.take().expect("it was asked for as a pipe")).lines();
        let mut stderr = child.stderr.take().expect("it was asked for as a pipe");
        let errors = tokio::spawn(async move {
            let mut text = Vec::new();
            // What cannot be read is ignored.
            let _ = stderr.read_to_end(&mut text).await;
            String::from_utf8_lossy(&text).into_owned()
        });
        let ready = async {
            while let Some(line) = stdout.next_line().await.context("reading what it prints")? {
                if line == "ready" {
                    return Ok(true);
                }
            }
            Ok(false)
        };
        let is_ready: Result<bool> = tokio::time::timeout(READY_WITHIN, ready).await.unwrap_or_else(|_| Err(anyhow!("not ready in time")));
        if !is_ready? {
            return Err(self.failed(&errors.await.unwrap_or_default()));
        }
        // No more output matters, but the program must be able to write it.
        let drain = tokio::spawn(async move { while let Ok(Some(_)) = stdout.next_line().await {} });
        Ok(Driven { child, stdin, tasks: vec![drain], errors })
    }

    fn name(&self) -> String {
        let name = |text: &String| Path::new(text).file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.command.iter().map(name).collect::<Vec<_>>().join(" ")
    }

    fn failed(&self, stderr: &str) -> Error {
        let line = stderr.lines().find(|line| line.contains("rror")).or_else(|| stderr.lines().last()).unwrap_or("it said nothing");
        anyhow!("{} failed: {}", self.name(), line.trim())
    }
}

const READY_WITHIN: Duration = Duration::from_mins(1);
const STOPPED_WITHIN: Duration = Duration::from_secs(15);

/// A program that is ready or running. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Driven {
    child: Child,
    stdin: ChildStdin,
    tasks: Vec<JoinHandle<()>>,
    errors: JoinHandle<String>,
}

impl Driven {
    /// Tells the program to begin.
    pub(super) async fn go(&mut self) -> Result<()> {
        self.stdin.write_all(b"go\n").await.context("telling a program to begin")?;
        self.stdin.flush().await.context("telling a program to begin")
    }

    /// Ends the program, and returns what it wrote to standard error.
    pub(super) async fn stop(mut self) -> Result<String> {
        drop(self.stdin);
        if tokio::time::timeout(STOPPED_WITHIN, self.child.wait()).await.is_err() {
            self.child.kill().await.context("ending a program")?;
        }
        for task in self.tasks {
            task.abort();
        }
        // This task ends with the program, unless a child process of the program lives on.
        Ok(tokio::time::timeout(Duration::from_secs(1), self.errors).await.ok().and_then(std::result::Result::ok).unwrap_or_default())
    }
}
