//! Tests of the webhook receiver: what it records, what it verifies, and how it misbehaves.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime};

use devkit::receiver::{Behaviour, Misbehaviour, Receiver, ReceiverOptions};
use reqwest::{Client, Response};
use standardwebhooks::Webhook;

use crate::upstream::client;

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
const SECRET: &str = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD";
const BOUND: Duration = Duration::from_secs(20);

async fn receiver() -> Receiver {
    Receiver::start(ANY_PORT, ReceiverOptions { secret: Some(SECRET.to_owned()) }).await.unwrap()
}

async fn deliver(client: &Client, receiver: &Receiver, path: &str, id: &str, secret: &str) -> reqwest::Result<Response> {
    let body = format!(r#"{{"id":"{id}"}}"#);
    let now = i64::try_from(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap();
    let signature = Webhook::new(secret).unwrap().sign(id, now, body.as_bytes()).unwrap();
    let request = client.post(receiver.url(path)).header("webhook-id", id).header("webhook-timestamp", now);
    request.header("webhook-signature", signature).body(body).send().await
}

#[tokio::test]
async fn a_delivery_is_recorded_with_its_path_and_verified_by_an_independent_library() {
    let (client, receiver) = (client(), receiver().await);
    assert_eq!(deliver(&client, &receiver, "/one", "a", SECRET).await.unwrap().status(), 204);
    deliver(&client, &receiver, "/two", "b", "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA").await.unwrap();
    let seen = receiver.deliveries();
    assert_eq!([&seen[0].path, &seen[1].path], ["/one", "/two"]);
    assert_eq!([seen[0].verified, seen[1].verified], [true, false]);
    assert_eq!((seen[0].body["id"].as_str(), seen[0].status), (Some("a"), Some(204)));
    assert_eq!(seen[1].refusal.as_deref(), Some("signature invalid"));
}

#[tokio::test]
async fn the_first_deliveries_of_each_id_fail_and_waiting_needs_no_sleep() {
    let (client, receiver) = (client(), receiver().await);
    receiver.set_behaviour(Behaviour { retry_after: Some(9), ..Behaviour::fail_first(1, 503) });
    let waiting = receiver.wait_for(BOUND, |seen| seen.iter().filter(|delivery| delivery.status == Some(204)).count() == 2);
    let sending = async {
        for id in ["a", "b"] {
            let first = deliver(&client, &receiver, "/", id, SECRET).await.unwrap();
            assert_eq!((first.status().as_u16(), first.headers()["retry-after"].to_str().unwrap()), (503, "9"));
            let second = deliver(&client, &receiver, "/", id, SECRET).await.unwrap();
            assert_eq!((second.status().as_u16(), second.headers().get("retry-after")), (204, None));
        }
    };
    let (seen, ()) = tokio::join!(waiting, sending);
    assert_eq!(seen.unwrap().iter().map(|delivery| delivery.number).collect::<Vec<_>>(), [1, 2, 1, 2]);
    let late = receiver.wait_for(Duration::from_millis(20), |seen| seen.len() == 99).await.unwrap_err();
    assert!(late.to_string().contains("4 deliveries"), "{late:?}");
}

#[tokio::test]
async fn a_path_misbehaves_without_the_others() {
    let (client, receiver) = (client(), receiver().await);
    let behave = |path: &str, misbehaviour| receiver.set_behaviour_of(path, Behaviour::always(misbehaviour));
    behave("/hang", Misbehaviour::Hang);
    behave("/drop", Misbehaviour::Drop);
    behave("/slow", Misbehaviour::SlowBody);
    behave("/moved", Misbehaviour::Redirect { location: receiver.url("/elsewhere") });

    let hang = tokio::time::timeout(Duration::from_millis(200), deliver(&client, &receiver, "/hang", "a", SECRET));
    assert!(hang.await.is_err());
    assert!(deliver(&client, &receiver, "/drop", "b", SECRET).await.is_err());
    let slow = deliver(&client, &receiver, "/slow", "c", SECRET).await.unwrap();
    assert_eq!(slow.status(), 200);
    assert!(tokio::time::timeout(Duration::from_millis(200), slow.bytes()).await.is_err());
    deliver(&client, &receiver, "/moved", "d", SECRET).await.unwrap();
    assert_eq!(deliver(&client, &receiver, "/other", "e", SECRET).await.unwrap().status(), 204);

    let seen = receiver.deliveries();
    let paths: Vec<&str> = seen.iter().map(|delivery| delivery.path.as_str()).collect();
    assert_eq!(paths, ["/hang", "/drop", "/slow", "/moved", "/elsewhere", "/other"], "a client that follows is seen");
    assert_eq!(seen.iter().map(|delivery| delivery.status).collect::<Vec<_>>()[..4], [None, None, Some(200), Some(302)]);
}

#[tokio::test]
async fn it_is_controlled_and_read_over_http() {
    let (client, receiver) = (client(), receiver().await);
    let put = client.put(receiver.url("/_behaviour?path=/x")).body(r#"{"misbehave":{"kind":"status","status":410}}"#);
    assert_eq!(put.send().await.unwrap().status(), 204);
    assert_eq!(client.put(receiver.url("/_behaviour")).body(r#"{"status":99}"#).send().await.unwrap().status(), 400);
    assert_eq!(deliver(&client, &receiver, "/x", "a", SECRET).await.unwrap().status(), 410);
    let answer = client.get(receiver.url("/_deliveries")).send().await.unwrap().bytes().await.unwrap();
    let summary: serde_json::Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!((summary["count"].as_u64(), summary["verified"].as_u64()), (Some(1), Some(1)));
    assert_eq!(summary["deliveries"][0]["status"].as_u64(), Some(410));
    receiver.stop().await;
}
