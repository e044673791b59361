//! Wrong settings stop the programs with one line that names the variable, the value and what is accepted.

use crate::world::{Binary, Env, PATIENCE, env, spawn};

async fn run(binary: Binary, args: &[&str], env: &Env) -> (i32, String) {
    let mut process = spawn(binary, args, env).await;
    let status = process.wait_exit(PATIENCE).await.unwrap();
    (status.code().unwrap(), process.log())
}

#[tokio::test]
async fn a_wrong_setting_stops_the_program_with_one_line() {
    let api = env(&[("DATABASE_URL", "postgres://localhost/x")]);
    let worker = [api.clone(), env(&[("UPSTREAM_URL", "http://localhost"), ("UPSTREAM_API_KEY", "k")])].concat();
    let cases = [
        (Binary::Api, &api, "SYNC_WAIT", "soon", "duration"),
        (Binary::Api, &api, "API_LISTEN", "8000", "ADDRESS"),
        (Binary::Api, &api, "MESSAGE_MAX_BYTES", "0", "a whole number from 1 to 16384"),
        (Binary::Api, &api, "MAX_PENDING", "lots", "a whole number from 0"),
        (Binary::Api, &api, "DATABASE_MAX_CONNECTIONS", "1", "from 2 to 1000"),
        (Binary::Api, &api, "OTEL_TRACES_SAMPLER_ARG", "NaN", "from 0 to 1"),
        (Binary::Api, &api, "OTEL_EXPORTER_OTLP_ENDPOINT", "localhost:4317", "http"),
        (Binary::Api, &api, "SYNC_WAIT", "18446744073709551615s", "up to 3650d"),
        (Binary::Api, &api, "LOG_FORMAT", "xml", "pretty, json"),
        (Binary::Api, &api, "DATABASE_URL", "mysql://localhost", "postgres://"),
        (Binary::Api, &api, "RUST_LOG", "a=b=c", "level"),
        (Binary::Api, &api, "RUST_LOG", "a=b=c\n", "level"),
        (Binary::Api, &api, "RUST_LOG", "inof", "level"),
        (Binary::Worker, &worker, "UPSTREAM_RATE", "fast", "10/60s"),
        (Binary::Worker, &worker, "UPSTREAM_URL", "ftp://x", "http"),
        (Binary::Worker, &worker, "SIGN_MAX_ATTEMPTS", "many", "from 1"),
        (Binary::Worker, &worker, "UPSTREAM_RETRYABLE_STATUSES", "5xx", "429"),
        (Binary::Worker, &worker, "SIGN_RETRY_JITTER", "2", "0 to 1"),
        (Binary::Worker, &worker, "SIGN_RETRY_STRATEGY", "hope", "adaptive"),
        (Binary::Worker, &worker, "WORKER_QUEUES", "mail", "webhook"),
        (Binary::Worker, &worker, "WEBHOOK_RETRY_SCHEDULE", "often", "5s"),
        (Binary::Worker, &worker, "WEBHOOK_ALLOW_NETWORKS", "everywhere", "127.0.0.0/8"),
        (Binary::Worker, &worker, "WEBHOOK_CONCURRENCY", "0", "from 1 to 4096"),
        (Binary::Worker, &worker, "WEBHOOK_RECEIVER_CONCURRENCY", "0", "from 1 to 4096"),
        (Binary::Worker, &worker, "WEBHOOK_HEADERS_TIMEOUT", "0s", "above 0"),
        (Binary::Api, &api, "WEBHOOK_ALLOW_NETWORKS", "10.0.0.1/99", "127.0.0.0/8"),
        (Binary::Api, &api, "WEBHOOK_ALLOW_PORTS", "http", "81,444"),
        (Binary::Worker, &worker, "WEBHOOK_ALLOW_PORTS", "0", "81,444"),
    ];
    for (binary, base, variable, value, accepted) in cases {
        let (code, log) = run(binary, &[], &[base.clone(), env(&[(variable, value)])].concat()).await;
        let said = log.trim_end();
        assert_eq!((code, said.lines().count()), (2, 1), "{variable}: {said}");
        for part in [variable, value.trim(), accepted] {
            assert!(said.contains(part), "{variable}={value}: {part} is not in: {said}");
        }
    }
}

#[tokio::test]
async fn a_database_or_a_role_that_does_not_exist_is_a_wrong_setting() {
    let cluster = devkit::postgres::shared_cluster().await.unwrap();
    let nobody = cluster.url("postgres").replace("postgres@", "nobody@");
    for (url, name) in [(cluster.url("nowhere"), "nowhere"), (nobody, "nobody")] {
        let (code, log) = run(Binary::Api, &[], &env(&[("DATABASE_URL", &url), ("API_LISTEN", "127.0.0.1:0")])).await;
        let said = log.lines().last().unwrap_or_default();
        assert!(code == 2 && said.starts_with("DATABASE_URL: ") && said.contains(name) && said.contains("; accepted: "), "{log}");
        assert_eq!(said.matches("does not exist").count(), 1, "{said}");
    }
}

#[tokio::test]
async fn a_setting_that_is_missing_or_holds_a_secret_is_named_without_its_value() {
    for binary in [Binary::Api, Binary::Worker] {
        let settings = [("DATABASE_URL", "postgres://u:hunter2@h/x?sslmode=no"), ("UPSTREAM_URL", "http://u"), ("UPSTREAM_API_KEY", "k")];
        let (code, log) = run(binary, &[], &env(&settings)).await;
        let lines: Vec<&str> = log.lines().filter(|line| !line.contains("WARN")).collect();
        assert!(code == 2 && lines.len() == 1 && lines[0].starts_with("DATABASE_URL: not understood; accepted: postgres://"), "{log}");
        assert!(!log.contains("hunter2"));
    }
    let endpoint = env(&[("DATABASE_URL", "postgres://localhost/x"), ("OTEL_EXPORTER_OTLP_ENDPOINT", "https://u:hunter2@h:4317")]);
    let (code, log) = run(Binary::Api, &[], &endpoint).await;
    assert!(code == 2 && log.contains("OTEL_EXPORTER_OTLP_ENDPOINT=https://[secret]: accepted:") && !log.contains("hunter2"), "{log}");
    let no_key = [("DATABASE_URL", "postgres://localhost/x"), ("UPSTREAM_URL", "http://u"), ("UPSTREAM_API_KEY", "")];
    let (code, log) = run(Binary::Worker, &[], &env(&no_key)).await;
    assert!(code == 2 && log.contains("UPSTREAM_API_KEY: not set") && log.trim_end().lines().count() == 1, "{log}");
    let (code, log) = run(Binary::Worker, &[], &env(&[("DATABASE_URL", "postgres://localhost/x")])).await;
    assert!(code == 2 && log.contains("UPSTREAM_URL") && log.trim_end().lines().count() == 1, "{log}");
    let (code, log) = run(Binary::Api, &[], &Env::new()).await;
    assert!(code == 2 && log.contains("DATABASE_URL") && log.trim_end().lines().count() == 1, "{log}");
}

#[tokio::test]
async fn a_command_without_what_it_needs_says_so_in_one_line() {
    let database = env(&[("DATABASE_URL", "postgres://localhost/x")]);
    for (arguments, missing) in [(&["keys", "create"][..], "--name <NAME>"), (&["keys", "revoke"], "--name <NAME>")] {
        let (code, log) = run(Binary::Api, arguments, &database).await;
        assert!(code == 2 && log.contains(missing) && log.trim_end().ends_with(": missing; see --help"), "{log}");
        assert_eq!(log.trim_end().lines().count(), 1, "{log}");
    }
}

#[tokio::test]
async fn help_shows_every_setting_with_its_default_and_the_document_needs_no_database() {
    let (code, help) = run(Binary::Worker, &["--help"], &Env::new()).await;
    assert_eq!(code, 0);
    for part in ["UPSTREAM_RATE", "10/60s", "WEBHOOK_RETRY_SCHEDULE", "5s,5m,30m,2h,5h,10h,14h,20h,24h", "RETENTION", "30d"] {
        assert!(help.contains(part), "{part}");
    }
    // As compose files pass variables of OpenTelemetry that are not set.
    let empty = ["PROTOCOL", "ENDPOINT"].map(|name| (format!("OTEL_EXPORTER_OTLP_{name}"), String::new()));
    let empty = empty.into_iter().chain(["SAMPLER", "SAMPLER_ARG"].map(|name| (format!("OTEL_TRACES_{name}"), String::new())));
    let (code, spec) = run(Binary::Api, &["openapi"], &empty.collect::<Env>()).await;
    assert_eq!(code, 0, "{spec}");
    let spec: serde_json::Value = serde_json::from_str(&spec).unwrap();
    assert!(spec["paths"]["/crypto/sign"]["post"].is_object() && spec["webhooks"].is_object());
}
