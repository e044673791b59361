//! The receivers in docs/webhooks.md work: they accept what the real worker sends, and refuse what was tampered with.
//!
//! Node and Python get the library from their registries, into a folder beside the build. If one of them is missing, the test reports that
//! it did not run; any other failure fails the test.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use devkit::ports::free_port;
use devkit::processes::Process;
use devkit::receiver::Delivery;
use devkit::upstream::SimulatorOptions;
use reqwest::Client;
use shared::contract::WebhookStatus;
use uuid::Uuid;

use crate::world::{PATIENCE, SECRET, World, until};

#[path = "../../../docs/webhooks/receiver.rs"]
mod receiver;

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/webhooks").join(name)
}

/// A folder beside the build that is kept between runs, so that nothing is fetched twice.
fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    std::fs::create_dir_all(&folder).unwrap();
    folder
}

/// Runs a command to its end. Returns false, and prints why, if the program or its registry is missing on this machine.
///
/// # Panics
/// If it fails for any other reason.
fn prepared(what: &str, command: &mut Command) -> bool {
    let missing = match command.output() {
        Ok(done) if done.status.success() => return true,
        Ok(done) => {
            let said = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(is_away(&said), "{what}: {said}");
            said.lines().last().unwrap_or_default().to_owned()
        }
        Err(error) => {
            assert_eq!(error.kind(), std::io::ErrorKind::NotFound, "{what}: {error}");
            error.to_string()
        }
    };
    devkit::wait::not_run(&format!("{what}: {missing}"));
    false
}

/// Whether npm or pip failed because it, or its registry, is not available.
fn is_away(said: &str) -> bool {
    const NPM: [&str; 6] = ["ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ERR_SOCKET_TIMEOUT"];
    const PIP: [&str; 4] = ["NewConnectionError", "ConnectTimeoutError", "ReadTimeoutError", "No module named pip"];
    NPM.iter().chain(&PIP).any(|sign| said.contains(sign))
}

#[test]
fn only_a_registry_that_is_away_excuses_a_failure() {
    assert!(is_away("npm error code EAI_AGAIN\nnpm error network request failed"));
    assert!(is_away("WARNING: Retrying after connection broken by 'NewConnectionError(...)'\nERROR: No matching distribution found"));
    assert!(!is_away("npm error code E404\nnpm error 404 Not Found"));
    assert!(!is_away("ERROR: No matching distribution found for standardwebhooks==1.*"));
    assert!(std::panic::catch_unwind(|| prepared("fails", &mut Command::new("false"))).is_err());
    assert!(!prepared("(nothing: a test of this line)", &mut Command::new("a-program-that-does-not-exist")));
}

/// Sends a delivery of the worker once more, to `url`, with this body.
async fn resend(client: &Client, url: &str, delivery: &Delivery, body: Vec<u8>) -> u16 {
    let names = ["webhook-id", "webhook-timestamp", "webhook-signature", "content-type"];
    let request = names.iter().fold(client.post(url), |request, name| request.header(*name, delivery.headers[*name].clone()));
    request.body(body).send().await.unwrap().status().as_u16()
}

/// The worker delivers to the example; a tampered delivery is refused; and a second delivery is handled once.
async fn takes_the_good_and_refuses_the_tampered(program: &Path, arguments: &[&str], more: &[(&str, &str)]) {
    let world = World::new(SimulatorOptions::reliable(), "1000/1s").await;
    let _worker = world.worker(&[]);
    // Our own receiver records what the worker sends, to send it to the example with a change.
    world.signed("known").await;
    let genuine = world.receiver.deliveries().remove(0);
    let port = free_port().unwrap().to_string();
    let base = [("WEBHOOK_SECRET", SECRET), ("PORT", &port)];
    let env = base.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let example = Process::spawn(program, arguments, env).unwrap();
    until("the example listens", async || example.log().contains("listening on")).await;
    let (client, url) = (Client::builder().no_proxy().build().unwrap(), format!("http://127.0.0.1:{port}/hook"));

    let id: Uuid = world.post_to([("known".to_owned(), url.clone())]).await.remove(0);
    until("the example took it", async || {
        let log = world.log(id).await;
        assert!(log.deliveries.iter().all(|attempt| attempt.status.is_none_or(|status| status == 204)), "{log:?}\n{}", example.log());
        log.webhook.unwrap().status == WebhookStatus::Delivered
    })
    .await;
    assert_eq!(example.log().matches(&id.to_string()).count(), 1, "{}", example.log());

    assert_eq!(resend(&client, &url, &genuine, genuine.raw.to_vec()).await, 204, "{}", example.log());
    assert_eq!(resend(&client, &url, &genuine, genuine.raw.to_vec()).await, 204);
    let told = genuine.body["data"]["id"].as_str().unwrap();
    until("it was handled", async || example.log().contains(told)).await;
    assert_eq!(example.log().matches(told).count(), 1, "the second one is a duplicate: {}", example.log());
    let tampered = String::from_utf8(genuine.raw.to_vec()).unwrap().replace("signed", "Signed");
    assert_eq!(resend(&client, &url, &genuine, tampered.into_bytes()).await, 401);
}

#[tokio::test]
async fn the_receiver_in_node_takes_a_webhook_and_refuses_a_tampered_one() {
    let folder = folder("example-node");
    if !folder.join("node_modules/standardwebhooks").exists() {
        let mut install = Command::new("npm");
        install.args(["install", "--no-save", "--ignore-scripts", "--prefix"]).arg(&folder).arg("standardwebhooks@1");
        if !prepared("npm install standardwebhooks", &mut install) {
            return;
        }
    }
    // A module looks for its packages in its own folder.
    std::fs::copy(example("receiver.mjs"), folder.join("receiver.mjs")).unwrap();
    if !prepared("node --version", Command::new("node").arg("--version")) {
        return;
    }
    takes_the_good_and_refuses_the_tampered(Path::new("node"), &[folder.join("receiver.mjs").to_str().unwrap()], &[]).await;
}

#[tokio::test]
async fn the_receiver_in_python_takes_a_webhook_and_refuses_a_tampered_one() {
    let folder = folder("example-python");
    if !folder.join("standardwebhooks").exists() {
        let mut install = Command::new("python3");
        install
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target"])
            .arg(&folder)
            .arg("standardwebhooks==1.*");
        if !prepared("pip install standardwebhooks", &mut install) {
            return;
        }
    }
    let path = folder.to_str().unwrap();
    let script = example("receiver.py");
    takes_the_good_and_refuses_the_tampered(Path::new("python3"), &[script.to_str().unwrap()], &[("PYTHONPATH", path)]).await;
}

#[tokio::test]
async fn the_receiver_in_rust_takes_a_webhook_and_refuses_a_tampered_one() {
    let world = World::new(SimulatorOptions::reliable(), "1000/1s").await;
    let _worker = world.worker(&[]);
    world.post(["known".to_owned()]).await;
    let sent = world.receiver.wait_for(PATIENCE, |all| !all.is_empty()).await.unwrap().remove(0);
    let (webhook, mut done) = (standardwebhooks::Webhook::new(SECRET).unwrap(), HashSet::new());
    assert_eq!(receiver::receive(&webhook, &sent.headers, &sent.raw, &mut done), 204);
    assert_eq!(receiver::receive(&webhook, &sent.headers, &sent.raw, &mut done), 204);
    assert_eq!(done.len(), 1);
    assert_eq!(receiver::receive(&webhook, &sent.headers, b"{}", &mut done), 401);
}
