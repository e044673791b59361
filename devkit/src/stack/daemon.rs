//! Background processes: they outlive the command that starts them, and are shut down gracefully.

use std::fs::OpenOptions;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::folder;
use super::settings::{Environment, set};
use super::state::{Running, start_of};

/// How long a process may take to shut down gracefully: the worker finishes the calls in flight.
const TERM_BOUND: Duration = Duration::from_secs(40);
const POLL: Duration = Duration::from_millis(20);

/// The path of a process's log.
pub(super) fn log_path(name: &str) -> Result<PathBuf> {
    Ok(folder()?.join("logs").join(format!("{name}.log")))
}

/// Starts a program in the background, with an empty log.
pub(super) fn start(name: &str, program: &Path, arguments: &[&str], environment: &Environment) -> Result<Running> {
    let path = log_path(name)?;
    let logs = path.parent().expect("it is in a folder");
    std::fs::create_dir_all(logs).with_context(|| format!("making {}", logs.display()))?;
    let log =
        OpenOptions::new().create(true).write(true).truncate(true).open(&path).with_context(|| format!("opening {}", path.display()))?;
    let both = log.try_clone().context("the log")?;
    let defaults = environment.defaults.iter().filter(|(variable, _)| set(variable).is_none());
    let child = Command::new(program)
        .args(arguments)
        .envs(defaults.chain(&environment.fixed).map(|(variable, value)| (*variable, value.as_str())))
        .stdin(Stdio::null())
        .stdout(log)
        .stderr(both)
        // Control-C in the terminal is for the foreground process.
        .process_group(0)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    let pid = child.id();
    let started = start_of(pid).ok_or_else(|| anyhow!("{name} ended at once: {}", last_line(name)))?;
    Ok(Running { name: name.to_owned(), pid, started })
}

/// Ends a process with SIGTERM, or with SIGKILL if that does not end it. Blocks until it is gone. Returns whether it was running.
pub(super) fn stop(process: &Running) -> Result<bool> {
    if !process.runs() {
        return Ok(false);
    }
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let pid = i32::try_from(process.pid).context("a process number")?;
        // It may end between the check and the signal; then there is nothing to do.
        let _ = kill(Pid::from_raw(pid), signal);
        let deadline = Instant::now() + TERM_BOUND;
        while Instant::now() < deadline {
            if !process.runs() {
                return Ok(true);
            }
            std::thread::sleep(POLL);
        }
    }
    Err(anyhow!("{} (process {}) does not end", process.name, process.pid))
}

/// The last non-blank line of a log.
pub(super) fn last_line(name: &str) -> String {
    let text = log_path(name).and_then(|path| std::fs::read(path).context("the log")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing").trim().to_owned()
}
