//! Callers that share a message or an idempotency key, or ask for another caller's request.

use devkit::receiver::Behaviour;
use devkit::upstream::{FaultKind, When};
use futures_util::future::join_all;
use serde_json::json;

use crate::world::{Options, PATIENCE, World, answer, env};

#[tokio::test]
async fn two_callers_of_one_message_at_the_same_moment_share_one_call_and_each_gets_its_webhook() {
    let world = World::new().await;
    let posts = (0..2).map(|caller| {
        let body = json!({ "message": "shared", "webhookUrl": world.hook(&format!("/{caller}")) });
        let post = world.post(&body).send();
        async move { answer(post.await.unwrap()).await }
    });
    let answers = join_all(posts).await;
    assert!(answers.iter().all(|answer| answer.status == 200), "{answers:?}");
    assert_ne!(answers[0].id(), answers[1].id());
    assert_eq!(answers[0].body["signature"], answers[1].body["signature"]);
    let deliveries = world.deliveries(2).await;
    assert!(deliveries.iter().all(|delivery| delivery.verified));
    let mut told: Vec<_> = deliveries.iter().map(|delivery| (delivery.path.clone(), delivery.body["data"]["id"].clone())).collect();
    told.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(told, [("/0".to_owned(), json!(answers[0].id())), ("/1".to_owned(), json!(answers[1].id()))]);
    assert_eq!(world.upstream.audit().sign_calls, 1);
}

#[tokio::test]
async fn many_callers_of_one_failing_message_never_have_two_calls_in_flight() {
    let world = World::new().await;
    world.fault(FaultKind::Outage, When::Next(3)).await;
    let posts = (0..30).map(|_| async { world.sign("wanted by many").await });
    let answers = join_all(posts).await;
    let states = join_all(answers.iter().map(|answer| async { world.settled(&answer.id()).await })).await;
    assert!(states.iter().all(|state| state["status"] == "signed"));
    let audit = world.upstream.audit();
    assert_eq!((audit.sign_calls, audit.max_in_flight_per_message, audit.signed_twice), (4, 1, 0));
}

#[tokio::test]
async fn an_idempotency_key_makes_a_repetition_safe_in_the_field_and_in_the_header() {
    let world = World::new().await;
    let field = json!({ "message": "a", "clientRequestId": "order-1" });
    let first = answer(world.post(&field).send().await.unwrap()).await;
    assert_eq!(first.body["clientRequestId"], "order-1");
    let again = answer(world.post(&field).send().await.unwrap()).await;
    let header = answer(world.post(&json!({ "message": "a" })).header("Idempotency-Key", "\"order-1\"").send().await.unwrap()).await;
    assert_eq!((first.id(), first.id()), (again.id(), header.id()));
    let other = answer(world.post(&json!({ "message": "b", "clientRequestId": "order-1" })).send().await.unwrap()).await;
    other.is_problem(422, "idempotency-mismatch");
    assert_eq!(world.number("select count(*) from requests").await, 1);
    assert_eq!(world.number("select count(*) from messages").await, 1);
}

#[tokio::test]
async fn a_webhook_is_retried_until_it_is_taken_and_its_headers_cannot_replace_ours() {
    let world = World::new().await;
    world.receiver.set_behaviour(Behaviour::fail_first(2, 500));
    let headers =
        json!({ "authorization": "Bearer t", "webhook-id": "forged", "Content-Type": "text/plain", "host": "elsewhere", "x-tenant": "7" });
    let body = json!({ "message": "a", "webhookUrl": world.hook("/hook"), "webhookHeaders": headers });
    let signed = answer(world.post(&body).send().await.unwrap()).await;
    let deliveries = world.deliveries(3).await;
    assert!(deliveries.iter().all(|delivery| delivery.verified && delivery.webhook_id == deliveries[0].webhook_id));
    assert_ne!(deliveries[0].webhook_id, "forged");
    let header = |name: &str| deliveries[0].headers.get(name).map_or("", |value| value.to_str().unwrap());
    assert_eq!((header("authorization"), header("x-tenant"), header("content-type")), ("Bearer t", "7", "application/json"));
    assert_eq!(deliveries[0].body["type"], "signature.completed");
    assert_eq!(deliveries[0].body["data"]["signature"], signed.body["signature"]);
    crate::world::until("the delivery is written", async || {
        answer(world.get(&signed.id()).await).await.body["webhook"]["status"] == "delivered"
    })
    .await;
    let webhook = answer(world.get(&signed.id()).await).await.body["webhook"].clone();
    assert_eq!((webhook["attempts"].as_u64(), webhook["lastStatus"].as_u64()), (Some(3), Some(204)));
}

#[tokio::test]
async fn a_webhook_to_a_private_address_is_not_sent_unless_it_is_allowed() {
    let closed = [("WEBHOOK_ALLOW_NETWORKS", ""), ("WEBHOOK_RETRY_SCHEDULE", "")];
    let world = World::with(Options { worker: env(&closed), ..Options::default() }).await;
    let port = world.receiver.addr().port();
    for host in ["127.0.0.1", "[::ffff:127.0.0.1]", "2130706433", "0x7f.1", "169.254.169.254", "example.com:22"] {
        let url = if host.contains(":22") { format!("http://{host}/") } else { format!("http://{host}:{port}/") };
        let refused = answer(world.post(&json!({ "message": host, "webhookUrl": url })).send().await.unwrap()).await;
        refused.is_problem(400, "invalid-request");
        assert_eq!(refused.body["errors"][0]["pointer"], "#/webhookUrl", "{host}");
    }
    assert_eq!(world.number("select count(*) from requests").await, 0);
    // Names are checked when the worker connects; the tenant learns only that the address is not allowed.
    for name in ["localhost", "does-not-exist.invalid"] {
        let body = json!({ "message": name, "webhookUrl": format!("http://{name}:{port}/") });
        let signed = answer(world.post(&body).send().await.unwrap()).await;
        crate::world::until("the delivery has failed", async || {
            answer(world.get(&signed.id()).await).await.body["webhook"]["status"] == "exhausted"
        })
        .await;
        let log = answer(world.get(&format!("{}/deliveries", signed.id())).await).await.body;
        assert_eq!((log["deliveries"][0]["error"].as_str(), &log["deliveries"][0]["response"]), (Some("address"), &json!(null)), "{log}");
    }
    assert_eq!(world.receiver.deliveries().len(), 0);
}

#[tokio::test]
async fn what_the_worker_may_send_to_the_api_accepts_without_being_told() {
    let world = World::new().await;
    let post = async |url: String| answer(world.post(&json!({ "message": "m", "webhookUrl": url })).send().await.unwrap()).await;
    assert_eq!(post(world.hook("/hook")).await.status, 200);
    world.receiver.wait_for(PATIENCE, |all| all.iter().any(|delivery| delivery.path == "/hook")).await.unwrap();
    post("http://10.0.0.1/".to_owned()).await.is_problem(400, "invalid-request");
}

#[tokio::test]
async fn before_the_first_worker_has_started_no_address_is_refused_and_that_worker_judges_them() {
    let mut world = World::new().await;
    world.worker.kill().await.unwrap();
    assert_eq!(world.number("with gone as (delete from webhook_addresses returning only_row) select count(*) from gone").await, 1);
    let mut ids = Vec::new();
    for url in [world.hook("/hook"), "http://10.0.0.1/".to_owned()] {
        let accepted = answer(world.post(&json!({ "message": url, "webhookUrl": url })).send().await.unwrap()).await;
        assert_eq!(accepted.status, 202, "{accepted:?}");
        ids.push(accepted.id());
    }
    world.restart_worker().await;
    world.receiver.wait_for(PATIENCE, |all| all.iter().any(|delivery| delivery.path == "/hook")).await.unwrap();
    crate::world::until("the other one is refused", async || {
        answer(world.get(&format!("{}/deliveries", ids[1])).await).await.body["deliveries"][0]["error"] == "address"
    })
    .await;
}

#[tokio::test]
async fn the_delivery_log_is_its_owners_and_a_webhook_is_sent_again_on_request() {
    let world = World::new().await;
    let hook = world.hook("/hook");
    world.receiver.set_behaviour(Behaviour { first: Some(1), ..Behaviour::always(devkit::receiver::Misbehaviour::Status { status: 410 }) });
    let signed = answer(world.post(&json!({ "message": "a", "webhookUrl": hook })).send().await.unwrap()).await;
    let log_of = |id: String| {
        let world = &world;
        async move { answer(world.get(&format!("{id}/deliveries")).await).await }
    };
    crate::world::until("it is exhausted", async || log_of(signed.id()).await.body["webhook"]["status"] == "exhausted").await;
    let replay = async |id: &str| {
        let post = world.client.post(format!("{}/crypto/sign/{id}/deliveries", world.url)).header("X-API-Key", crate::world::KEY);
        answer(post.send().await.unwrap()).await
    };
    let again = replay(&signed.id()).await;
    assert_eq!((again.status.as_u16(), again.body["webhookId"].as_str().map(|id| id.starts_with("msg_"))), (202, Some(true)), "{again:?}");
    let deliveries = world.deliveries(2).await;
    assert_eq!(deliveries[0].webhook_id, deliveries[1].webhook_id);
    crate::world::until("it is delivered", async || log_of(signed.id()).await.body["webhook"]["status"] == "delivered").await;
    let log = log_of(signed.id()).await.body;
    let entries = log["deliveries"].as_array().unwrap();
    assert_eq!(
        (entries[0]["status"].as_u64(), entries[0]["error"].as_str(), entries[0]["outcome"].as_str()),
        (Some(410), Some("status"), Some("failed"))
    );
    assert_eq!((entries[1]["status"].as_u64(), entries[1]["outcome"].as_str()), (Some(204), Some("delivered")));
    assert!(entries.iter().all(|entry| entry["durationMs"].is_u64() && entry["startedAt"].is_string()));

    let silent = world.sign("no webhook").await;
    replay(&silent.id()).await.is_problem(409, "no-webhook");
    assert_eq!(log_of(silent.id()).await.body["deliveries"], json!([]));
    let unknown = "0190163d-8694-739b-aea5-966c26f8ad91";
    replay(unknown).await.is_problem(404, "not-found");
    log_of(unknown.to_owned()).await.is_problem(404, "not-found");
    world.fault(FaultKind::Outage, When::Always).await;
    let pending =
        answer(world.post(&json!({ "message": "b", "webhookUrl": hook })).header("Prefer", "respond-async").send().await.unwrap()).await;
    replay(&pending.id()).await.is_problem(409, "not-final");
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_caller_that_waits_costs_a_few_kilobytes() {
    use tokio::io::AsyncWriteExt;
    use tokio::net::TcpStream;

    const CALLERS: usize = 500;
    /// Callers come in groups of this size: memory that simultaneous requests need is not given back, and would be counted.
    const TOGETHER: usize = 10;
    // One call per hour: no other caller is answered.
    let world = World::with(Options { rate: "1/3600s", ..Options::default() }).await;
    let kilobytes = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", world.api.pid().unwrap())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
    };
    let address = world.url.strip_prefix("http://").unwrap();
    let wait = async |already: usize| {
        let mut callers = Vec::new();
        for n in already..already + CALLERS {
            let body = format!("{{\"message\":\"caller {n}\"}}");
            let head = format!("POST /crypto/sign HTTP/1.1\r\nhost: a\r\nx-api-key: {}\r\nprefer: wait=60\r\n", crate::world::KEY);
            let mut caller = TcpStream::connect(address).await.unwrap();
            let request = format!("{head}content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            caller.write_all(request.as_bytes()).await.unwrap();
            callers.push(caller);
            if callers.len().is_multiple_of(TOGETHER) {
                let stored = i64::try_from(n + 1).unwrap();
                crate::world::until("all are stored", async || world.number("select count(*) from messages").await == stored).await;
            }
        }
        callers
    };
    // The first callers bring the process to its normal size.
    let first = wait(0).await;
    let before = kilobytes();
    let second = wait(CALLERS).await;
    let each = (kilobytes() - before) / CALLERS;
    println!("{each} KB each");
    assert!(each < 12, "{each} KB");
    let waits = |caller: &&TcpStream| caller.try_read(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
    assert!(first.iter().chain(&second).filter(waits).count() >= 2 * CALLERS - 1, "all but the one that was signed still wait");
}
