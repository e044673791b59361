//! The answers that the contract promises.

use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use devkit::upstream::{FaultKind, SimulatorOptions, When};
use serde_json::{Value, json};

use crate::world::{KEY, Options, World, answer, env};

#[tokio::test]
async fn messages_of_every_kind_reach_the_upstream_exactly_and_verify() {
    let world = World::new().await;
    let messages = [
        "a",
        " leading and trailing ",
        "two\nlines\r\n\ttab",
        "emoji 🦀🧾 and e\u{301}",
        "a+b&c=d%20e#f?g/h\\i\"j'k<l>;:@,",
        "\0\u{1}\u{7f}",
        "日本語とعربى",
        &"x".repeat(4096),
        &"🦀".repeat(1024),
    ];
    for message in messages {
        let signed = world.sign(message).await;
        assert_eq!(signed.status, 200, "{signed:?}");
        assert_eq!((signed.body["message"].as_str(), signed.body["status"].as_str()), (Some(message), Some("signed")));
        let signature = signed.body["signature"].as_str().unwrap();
        let mut verify: url::Url = format!("{}/crypto/verify", world.upstream.url()).parse().unwrap();
        verify.query_pairs_mut().append_pair("message", message).append_pair("signature", signature);
        let verified = world.client.get(verify).header("Authorization", "upstream-key").send().await.unwrap();
        assert_eq!(verified.status(), 200, "{message:?}");
    }
}

#[tokio::test]
async fn a_request_that_is_not_valid_gets_its_problem_and_leaves_no_row() {
    let world = World::new().await;
    let bodies = [
        (json!({}), "#/message"),
        (json!({ "message": "" }), "#/message"),
        (json!({ "message": 1 }), "#/message"),
        (json!({ "message": null }), "#/message"),
        (json!({ "message": "m", "extra": 1 }), "#/extra"),
        (json!({ "message": "m", "webhookUrl": "ftp://example.com" }), "#/webhookUrl"),
        (json!({ "message": "m", "webhookUrl": "http://user:secret@example.com" }), "#/webhookUrl"),
        (json!({ "message": "m", "webhookUrl": "nonsense" }), "#/webhookUrl"),
        (json!({ "message": "m", "webhookUrl": 5 }), "#/webhookUrl"),
        (json!({ "message": "m", "webhookUrl": "http://h/\0" }), "#/webhookUrl"),
        (json!({ "message": "m", "webhookHeaders": ["a"] }), "#/webhookHeaders"),
        (json!({ "message": "m", "webhookHeaders": { "bad name": "v" } }), "#/webhookHeaders/bad%20name"),
        (json!({ "message": "m", "webhookHeaders": { "x": "line\nbreak" } }), "#/webhookHeaders/x"),
        (json!({ "message": "m", "clientRequestId": "x".repeat(129) }), "#/clientRequestId"),
        (json!({ "message": "m", "clientRequestId": "\u{7}" }), "#/clientRequestId"),
        (json!("message"), "#"),
    ];
    for (body, pointer) in bodies {
        let refused = answer(world.post(&body).send().await.unwrap()).await;
        refused.is_problem(400, "invalid-request");
        assert_eq!(refused.body["errors"][0]["pointer"], pointer, "{body}");
    }
    for text in ["", "{", "nope", "{\"message\": \"\\ud800\"}"] {
        answer(world.post(&Value::Null).body(text).send().await.unwrap()).await.is_problem(400, "invalid-request");
    }
    answer(world.post(&Value::Null).body(vec![b'"', 0xff, b'"']).send().await.unwrap()).await.is_problem(400, "invalid-request");
    let oversize = json!({ "message": "x".repeat(4097) });
    let too_long = answer(world.post(&oversize).send().await.unwrap()).await;
    too_long.is_problem(413, "too-large");
    assert_eq!(too_long.body["errors"][0]["pointer"], "#/message");
    // The client sees the answer although it is still sending, also if it did not say how long the body is.
    for megabytes in [1, 10, 32] {
        let body = json!({ "message": "x".repeat(megabytes << 20) }).to_string();
        let chunked = futures_util::stream::iter([Ok::<_, std::io::Error>(body.clone())]);
        for body in [reqwest::Body::from(body), reqwest::Body::wrap_stream(chunked)] {
            answer(world.post(&Value::Null).body(body).send().await.unwrap()).await.is_problem(413, "too-large");
        }
    }
    // One that asks whether to send it is told not to.
    let mut asking = tokio::net::TcpStream::connect(world.url.trim_start_matches("http://")).await.unwrap();
    let head = format!(
        "POST /crypto/sign HTTP/1.1\r\nHost: x\r\nX-API-Key: {KEY}\r\nContent-Type: application/json\r\nContent-Length: 99999999\r\nExpect: 100-continue\r\n\r\n"
    );
    asking.write_all(head.as_bytes()).await.unwrap();
    let mut first = [0; 12];
    asking.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 413");
    let typed = |content_type: &'static str| {
        let post = world.client.post(format!("{}/crypto/sign", world.url)).header("X-API-Key", KEY);
        post.header("Content-Type", content_type).body("{\"message\":\"m\"}")
    };
    answer(typed("text/plain").send().await.unwrap()).await.is_problem(415, "not-json");
    let untyped = world.client.post(format!("{}/crypto/sign", world.url)).header("X-API-Key", KEY).body("{\"message\":\"m\"}");
    answer(untyped.send().await.unwrap()).await.is_problem(415, "not-json");
    let both = world.post(&json!({ "message": "m", "clientRequestId": "a" })).header("Idempotency-Key", "b");
    answer(both.send().await.unwrap()).await.is_problem(400, "invalid-header");
    for table in ["requests", "messages", "jobs"] {
        assert_eq!(world.number(&format!("select count(*) from {table}")).await, 0, "{table}");
    }
}

#[tokio::test]
async fn routes_and_methods_that_do_not_exist_are_problems_too() {
    let world = World::new().await;
    let get = async |path: &str| answer(world.client.get(format!("{}{path}", world.url)).send().await.unwrap()).await;
    get("/nothing/here").await.is_problem(404, "no-such-route");
    let wrong = get("/crypto/sign").await;
    wrong.is_problem(405, "method-not-allowed");
    assert_eq!(wrong.header("allow"), "POST");
    answer(world.get("not-an-id").await).await.is_problem(404, "not-found");
    for path in ["/crypto/sign/%FF", "/%FF", "/health/%FF", "/docs/%FF"] {
        get(path).await.is_problem(404, "no-such-route");
    }
}

#[tokio::test]
async fn documents_health_and_figures_need_no_key() {
    let world = World::new().await;
    world.sign("a").await;
    for (path, holds) in [
        ("/docs", "swagger"),
        ("/openapi.json", "signature.completed"),
        ("/health/live", "alive"),
        ("/health/ready", "ready"),
        ("/metrics", "countersign_http_requests_total"),
    ] {
        let answered = world.client.get(format!("{}{path}", world.url)).send().await.unwrap();
        assert_eq!(answered.status(), 200, "{path}");
        assert!(answered.text().await.unwrap().contains(holds), "{path}");
    }
}

#[tokio::test]
async fn a_post_while_the_upstream_hangs_is_answered_202_within_two_seconds() {
    let world = World::new().await;
    world.fault(FaultKind::Hang, When::Always).await;
    let started = Instant::now();
    let pending = world.sign("stuck").await;
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert_eq!((pending.status.as_u16(), pending.body["status"].as_str()), (202, Some("pending")));
    assert_eq!(pending.header("location"), format!("/crypto/sign/{}", pending.id()));
    assert!(pending.header("retry-after").parse::<u64>().unwrap() >= 1);
    for field in ["attempts", "createdAt", "nextAttemptAt", "queuePosition", "estimatedCompletionAt", "statusUrl"] {
        assert!(!pending.body[field].is_null(), "{field} in {pending:?}");
    }
    let state = answer(world.get(&pending.id()).await).await;
    assert_eq!((state.status.as_u16(), state.body["status"].as_str()), (200, Some("pending")));
}

#[tokio::test]
async fn a_signed_message_is_answered_at_once_without_another_call() {
    let world = World::new().await;
    let (first, again) = (world.sign("once").await, world.sign("once").await);
    assert_eq!((first.status.as_u16(), again.status.as_u16()), (200, 200));
    assert_eq!(first.body["signature"], again.body["signature"]);
    assert_ne!(first.id(), again.id());
    assert_eq!(world.upstream.audit().sign_calls, 1);
}

#[tokio::test]
async fn preferences_are_honoured_and_said() {
    let world = World::with(Options { upstream: SimulatorOptions::reliable(), ..Options::default() }).await;
    world.fault(FaultKind::Hang, When::Always).await;
    let started = Instant::now();
    let post = world.post(&json!({ "message": "a" })).header("Prefer", "respond-async");
    let receipt = answer(post.send().await.unwrap()).await;
    assert!(started.elapsed() < Duration::from_secs(1));
    assert_eq!((receipt.status.as_u16(), receipt.header("preference-applied")), (202, "respond-async"));
    let started = Instant::now();
    let post = world.post(&json!({ "message": "b" })).header("Prefer", "wait=3");
    let waited = answer(post.send().await.unwrap()).await;
    assert!(started.elapsed() >= Duration::from_secs(3));
    assert_eq!((waited.status.as_u16(), waited.header("preference-applied")), (202, "wait=3"));
}

#[tokio::test]
async fn a_long_poll_is_answered_when_the_request_is_final() {
    let world = World::with(Options {
        upstream: SimulatorOptions { latency: Duration::from_millis(2500)..=Duration::from_millis(2500), ..SimulatorOptions::reliable() },
        ..Options::default()
    })
    .await;
    let pending = world.sign("slow").await;
    assert_eq!(pending.status, 202);
    let started = Instant::now();
    let poll = world.client.get(format!("{}/crypto/sign/{}", world.url, pending.id())).header("X-API-Key", KEY).header("Prefer", "wait=30");
    let signed = answer(poll.send().await.unwrap()).await;
    assert_eq!((signed.body["status"].as_str(), signed.header("preference-applied")), (Some("signed"), "wait=30"));
    assert!(started.elapsed() < Duration::from_secs(10), "it did not wait for its time to be up");
}

#[tokio::test]
async fn above_the_most_waiters_a_caller_gets_its_receipt_at_once() {
    let world = World::with(Options { api: env(&[("MAX_WAITERS", "1")]), ..Options::default() }).await;
    world.fault(FaultKind::Hang, When::Always).await;
    let post =
        async |message: &str| answer(world.post(&json!({ "message": message })).header("Prefer", "wait=8").send().await.unwrap()).await;
    let patient = post("first");
    let hasty = async {
        crate::world::until("the first one waits", async || world.upstream.audit().sign_calls == 1).await;
        let started = Instant::now();
        (post("second").await, started.elapsed())
    };
    let (first, (second, took)) = tokio::join!(patient, hasty);
    assert_eq!((first.status.as_u16(), second.status.as_u16()), (202, 202));
    assert!(took < Duration::from_secs(4), "{took:?}");
}

#[tokio::test]
async fn a_refused_message_is_422_and_stays_failed() {
    // 500 is not in the list, so it is final.
    let world = World::with(Options { worker: env(&[("UPSTREAM_RETRYABLE_STATUSES", "502")]), ..Options::default() }).await;
    world.fault(FaultKind::Error, When::Always).await;
    let refused = world.sign("unacceptable").await;
    refused.is_problem(422, "upstream-refused");
    let id = refused.body["requestId"].as_str().unwrap();
    let state = answer(world.get(id).await).await.body;
    assert_eq!((state["status"].as_str(), state["lastError"]["code"].as_str()), (Some("failed"), Some("upstream-refused")));
    assert_eq!(state["lastError"]["status"], 500);
}
