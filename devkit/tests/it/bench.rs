//! Tests of the benchmark harness, on its smallest measurements: what it prints and writes, not what it measures.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

fn bench(arguments: &[&str], path: Option<&Path>) -> (bool, String, Value) {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("results.json");
    let temporary = folder.path().join("temporary");
    std::fs::create_dir(&temporary).unwrap();
    // Like `/tmp`: Postgres may run under a different account than this test.
    std::fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(&temporary, Permissions::from_mode(0o1777)).unwrap();
    // The harness looks for `api` and `worker` next to itself, so they are built in the same profile as this test.
    devkit::processes::build().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_devkit"));
    command.args(["bench", "--quick", "--time", "300ms", "--output"]).arg(&output).args(arguments);
    command.env("TMPDIR", &temporary).stdin(Stdio::null());
    if let Some(path) = path {
        command.env("PATH", path);
    }
    let run = command.output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    let left: Vec<_> = std::fs::read_dir(&temporary).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(left.is_empty(), "left behind: {left:?}\n{text}");
    let results = std::fs::read(&output).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
    (run.status.success(), text, results)
}

#[test]
fn a_quick_benchmark_prints_its_rows_and_writes_them_with_the_machine_and_every_safety_on() {
    let small = ["--peers", "none", "--clients", "8", "--jobs", "200"];
    let (success, text, results) = bench(&[&["accept", "webhooks"], &small[..]].concat(), None);
    assert!(success, "{text}");
    assert!(
        text.contains("accept: POST to a durable 202, 8 clients")
            && text.contains("accept: POST to a durable 202, 32 clients")
            && text.contains("webhooks: deliveries to a receiver that takes 100 ms"),
        "{text}"
    );
    assert!(text.contains("the figures mean nothing"), "{text}");

    let rows = results["rows"].as_array().unwrap();
    assert_eq!(
        rows.iter().map(|row| row["workload"].as_str().unwrap()).collect::<Vec<_>>(),
        ["accept", "accept", "webhooks", "webhooks", "webhooks", "webhooks"]
    );
    assert!(rows.iter().all(|row| row["ours"]["median"].as_f64().unwrap() > 0.0), "{results:#}");
    assert!(rows[2..5].iter().all(|row| row["ratio"].as_f64().unwrap() > 0.0), "{results:#}");
    assert_eq!(results["plan"]["clients"], 8);
    assert!(results["machine"]["cores"].as_u64().unwrap() > 0);
    let settings = results["machine"]["postgresSettings"].as_array().unwrap();
    for name in ["fsync", "synchronous_commit", "full_page_writes"] {
        assert!(settings.contains(&serde_json::json!([name, "on"])), "{results:#}");
    }
}

#[test]
fn a_peer_that_is_not_there_is_reported_with_the_reason() {
    // There is no Node in an empty folder; the services and Postgres are found without a PATH.
    let empty = tempfile::tempdir().unwrap();
    let (success, text, results) = bench(&["accept", "--peers", "fastify", "--clients", "4"], Some(empty.path()));
    assert!(success && text.contains("not run: no Node"), "{text}");
    let rows = results["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 4, "with few callers and with more, with each setting of Redis");
    for row in rows {
        assert_eq!(row["verdict"], "not_run");
        let reason = row["peer"]["figures"]["not_run"].as_str().unwrap();
        assert!(reason.contains("Node"), "{reason}");
    }
}
