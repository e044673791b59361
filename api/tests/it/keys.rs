//! API keys, by the commands that operators use.

use serde_json::json;

use crate::world::{Binary, KEY, PATIENCE, World, answer, env, spawn, until};

/// Runs `api` with these arguments and gives its exit code and what it printed.
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
}
