//! Tests of child processes: a clean environment, a log to wait on, signals, and the exit.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use devkit::processes::{Process, Signal};

const BOUND: Duration = Duration::from_secs(20);

fn shell(script: &str, environment: &[(&str, &str)]) -> Process {
    let environment: HashMap<String, String> = environment.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    Process::spawn(Path::new("/bin/sh"), ["-c", script], environment).unwrap()
}

#[tokio::test]
async fn the_environment_is_what_is_given() {
    let mut process = shell("env; echo >&2 to both outputs", &[("GIVEN", "yes")]);
    assert_eq!(process.wait_for_log("to both outputs", BOUND).await.unwrap(), "to both outputs");
    assert!(process.wait_exit(BOUND).await.unwrap().success());
    process.wait_for_log("GIVEN=yes", BOUND).await.unwrap();
    let log = process.log();
    assert!(log.contains("RUST_BACKTRACE=1") && !log.contains("CARGO"), "{log}");
}

#[tokio::test]
async fn a_process_is_stopped_continued_and_ended_by_signals() {
    let mut process = shell("trap 'echo asked; exit 3' TERM; echo ready; while :; do sleep 0.05; done", &[]);
    process.wait_for_log("ready", BOUND).await.unwrap();
    process.signal(Signal::Stop).unwrap();
    process.signal(Signal::Term).unwrap();
    assert!(process.wait_exit(Duration::from_millis(200)).await.unwrap_err().to_string().contains("its log ends in: ready"));
    process.signal(Signal::Cont).unwrap();
    assert_eq!(process.wait_exit(BOUND).await.unwrap().code(), Some(3));
    process.wait_for_log("asked", BOUND).await.unwrap();
    process.signal(Signal::Kill).unwrap();
}

#[tokio::test]
async fn a_dropped_process_is_killed() {
    let process = shell("echo ready; exec sleep 600", &[]);
    process.wait_for_log("ready", BOUND).await.unwrap();
    let pid = nix::unistd::Pid::from_raw(process.pid().unwrap().try_into().unwrap());
    drop(process);
    let gone = async {
        while nix::sys::signal::kill(pid, None).is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(BOUND, gone).await.unwrap();
}
