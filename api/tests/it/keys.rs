//! API keys, through the commands that operators use.

use serde_json::json;

use crate::world::{Binary, KEY, PATIENCE, World, answer, env, spawn, until};

/// Runs `api` with these arguments, and returns its exit code and its output.
async fn api(world: &World, args: &[&str]) -> (i32, String) {
    let mut process = spawn(Binary::Api, args, &env(&[("DATABASE_URL", &world.database)])).await;
    let status = process.wait_exit(PATIENCE).await.unwrap();
    (status.code().unwrap(), process.log())
}

fn printed(log: &str, label: &str) -> String {
    log.lines().find_map(|line| line.strip_prefix(label)).unwrap_or_else(|| panic!("no {label} in {log}")).trim().to_owned()
}

async fn post_with(world: &World, key: &str, message: &str) -> crate::world::Answer {
    let post = world.client.post(format!("{}/crypto/sign", world.url)).header("X-API-Key", key);
    answer(post.header("Content-Type", "application/json").body(json!({ "message": message }).to_string()).send().await.unwrap()).await
}

#[tokio::test]
async fn no_key_and_a_wrong_key_are_401_and_leave_no_row() {
    let world = World::new().await;
    let bare =
        world.client.post(format!("{}/crypto/sign", world.url)).header("Content-Type", "application/json").body("{\"message\":\"m\"}");
    let refused = answer(bare.send().await.unwrap()).await;
    refused.is_problem(401, "unauthorized");
    assert!(!refused.header("www-authenticate").is_empty());
    post_with(&world, "wrong", "m").await.is_problem(401, "unauthorized");
    post_with(&world, "", "m").await.is_problem(401, "unauthorized");
    assert_eq!(world.number("select count(*) from requests").await, 0);
}

#[tokio::test]
async fn a_key_is_created_used_listed_and_revoked_and_is_nowhere_stored() {
    let world = World::new().await;
    let (code, log) = api(&world, &["keys", "create", "--name", "billing"]).await;
    assert_eq!(code, 0, "{log}");
    let (key, secret) = (printed(&log, "key:"), printed(&log, "webhook secret:"));
    assert!(secret.starts_with("whsec_"));
    assert_eq!(post_with(&world, &key, "m").await.status, 200);
    let (_, list) = api(&world, &["keys", "list"]).await;
    assert!(list.contains("billing") && list.contains("bootstrap") && !list.contains(&key));
    let stored = format!("select count(*) from api_keys where api_keys::text like '%{key}%' or encode(digest, 'escape') like '%{key}%'");
    assert_eq!(world.number(&stored).await, 0);
    let (code, log) = api(&world, &["keys", "create", "--name", "bootstrap"]).await;
    assert!(code != 0 && log.contains("BOOTSTRAP_API_KEY"), "a start of `api` would replace it: {log}");
    let (code, log) = api(&world, &["keys", "create", "--name", "billing"]).await;
    assert!(code == 1 && log.contains("a live key has this name"), "{log}");
    assert_eq!(api(&world, &["keys", "revoke", "billing"]).await.0, 0);
    until("the revoked key is refused", async || post_with(&world, &key, "n").await.status == 401).await;
    let (code, log) = api(&world, &["keys", "revoke", "billing"]).await;
    assert!(code == 1 && log.contains("no live key"), "{log}");
}

#[tokio::test]
async fn another_keys_request_is_404_but_not_to_an_admin() {
    let world = World::new().await;
    let (_, log) = api(&world, &["keys", "create", "--name", "one"]).await;
    let one = printed(&log, "key:");
    let (_, log) = api(&world, &["keys", "create", "--name", "two", "--scopes", "sign"]).await;
    let two = printed(&log, "key:");
    let id = post_with(&world, &one, "private").await.id();
    let get = async |key: &str| {
        answer(world.client.get(format!("{}/crypto/sign/{id}", world.url)).header("X-API-Key", key).send().await.unwrap()).await
    };
    assert_eq!(get(&one).await.status, 200);
    get(&two).await.is_problem(404, "not-found");
    assert_eq!(get(KEY).await.status, 200, "the bootstrap key is an admin's");
}

#[tokio::test]
async fn a_key_without_the_scope_is_403_and_an_expired_one_401() {
    let world = World::new().await;
    let (_, log) = api(&world, &["keys", "create", "--name", "auditor", "--scopes", "admin"]).await;
    post_with(&world, &printed(&log, "key:"), "m").await.is_problem(403, "forbidden");
    let (_, log) = api(&world, &["keys", "create", "--name", "brief", "--expires-in", "1ms"]).await;
    post_with(&world, &printed(&log, "key:"), "m").await.is_problem(401, "unauthorized");
    let (_, listed) = api(&world, &["keys", "list"]).await;
    assert!(listed.lines().any(|line| line.starts_with("brief") && line.ends_with("expired")), "{listed}");
    let (code, log) = api(&world, &["keys", "create", "--name", "brief"]).await;
    assert_eq!(code, 0, "an expired key keeps no name: {log}");
}

const KEY_A: &str = "a:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
const KEY_B: &str = "b:BBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBBE=";

#[tokio::test]
async fn a_webhook_secret_is_rotated_by_command_and_the_delivery_log_of_another_key_is_404() {
    let world = World::new().await;
    let (_, log) = api(&world, &["keys", "create", "--name", "billing"]).await;
    let (key, old) = (printed(&log, "key:"), printed(&log, "webhook secret:"));
    let (code, log) = api(&world, &["keys", "rotate-webhook-secret", "billing", "--grace", "1h"]).await;
    assert_eq!(code, 0, "{log}");
    let new = printed(&log, "webhook secret:");
    let post = world.client.post(format!("{}/crypto/sign", world.url)).header("X-API-Key", &key).header("Content-Type", "application/json");
    let body = json!({ "message": "m", "webhookUrl": world.hook("/rotated") });
    let id = answer(post.body(body.to_string()).send().await.unwrap()).await.id();
    let sent = world.deliveries(1).await.remove(0);
    assert_eq!(sent.headers["webhook-signature"].to_str().unwrap().split(' ').count(), 2);
    for secret in [&old, &new] {
        let secret: shared::standard_webhooks::WebhookSecret = secret.parse().unwrap();
        let signature = secret.sign(&sent.webhook_id, sent.timestamp.unwrap(), &sent.raw);
        assert!(sent.headers["webhook-signature"].to_str().unwrap().contains(&signature));
    }
    let (_, log) = api(&world, &["keys", "create", "--name", "other"]).await;
    let other = printed(&log, "key:");
    let get = world.client.get(format!("{}/crypto/sign/{id}/deliveries", world.url)).header("X-API-Key", other);
    answer(get.send().await.unwrap()).await.is_problem(404, "not-found");
    let (code, log) = api(&world, &["keys", "rotate-webhook-secret", "nobody"]).await;
    assert!(code == 1 && log.contains("no live key"), "{log}");
}

#[tokio::test]
async fn with_an_encryption_key_nothing_secret_is_in_the_database_and_who_lacks_the_key_says_so_in_one_line() {
    let key = env(&[("ENCRYPTION_KEY", KEY_A)]);
    let world = World::with(crate::world::Options { api: key.clone(), worker: key, ..Default::default() }).await;
    let body = json!({ "message": "m", "webhookUrl": world.hook("/"), "webhookHeaders": { "authorization": "private-header" } });
    assert_eq!(answer(world.post(&body).send().await.unwrap()).await.status, 200);
    let sent = world.deliveries(1).await.remove(0);
    assert!(sent.verified && sent.headers["authorization"] == "private-header");
    assert_eq!(
        world.number("select count(*) from requests where requests::text like '%private-header%' or sealed_webhook_headers is null").await,
        0
    );
    assert_eq!(world.number("select count(*) from api_keys where webhook_secret_key_id is distinct from 'a'").await, 0);
    assert!(!world.api.log().contains("stored unencrypted") && !world.worker.log().contains("stored unencrypted"));

    let (code, log) = api(&world, &["keys", "list"]).await;
    let said = log.trim_end();
    assert_eq!((code, said.lines().count()), (2, 1), "{said}");
    assert!(said.starts_with("ENCRYPTION_KEY: the key `a` is missing") && said.contains("`a:BASE64`"), "{said}");
    let worker = env(&[
        ("DATABASE_URL", world.database.as_str()),
        ("ENCRYPTION_KEY", KEY_B),
        ("WORKER_QUEUES", "webhook"),
        ("WORKER_LISTEN", "127.0.0.1:0"),
        ("RUST_LOG", "off"),
    ]);
    let mut worker = spawn(Binary::Worker, &[], &worker).await;
    assert_eq!(worker.wait_exit(PATIENCE).await.unwrap().code(), Some(2));
    assert_eq!(worker.log().trim_end().lines().count(), 1, "{}", worker.log());
    assert!(worker.log().starts_with("ENCRYPTION_KEY: the key `a` is missing"), "{}", worker.log());

    let mut process = spawn(
        Binary::Api,
        &["keys", "reencrypt"],
        &env(&[("DATABASE_URL", &world.database), ("ENCRYPTION_KEY", &format!("{KEY_B},{KEY_A}"))]),
    )
    .await;
    assert_eq!(process.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", process.log());
    assert!(process.log().contains("encrypted again: 1 webhook secrets") && process.log().contains("still needed: a"), "{}", process.log());
}

#[tokio::test]
async fn without_an_encryption_key_each_process_says_so_once() {
    let world = World::new().await;
    for log in [world.api.log(), world.worker.log()] {
        assert_eq!(log.matches("ENCRYPTION_KEY is not set").count(), 1, "{log}");
    }
}
