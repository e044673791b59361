//! Tests of the simulated upstream over real HTTP: what a client sees, and what the audit reports.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use devkit::upstream::{Audit, Fault, FaultKind, Faults, Simulator, SimulatorOptions, When};
use reqwest::{Client, StatusCode};

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 0);
const DEGRADED: &str = "Failed to sign message due to simulated service degradation.";

async fn reliable() -> Simulator {
    Simulator::start(ANY_PORT, SimulatorOptions::reliable()).await.unwrap()
}

pub(crate) fn client() -> Client {
    // Another test may have installed it already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder().timeout(Duration::from_secs(20)).build().unwrap()
}

fn encoded(text: &str) -> String {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC).to_string()
}

async fn get(client: &Client, upstream: &Simulator, rest: &str) -> reqwest::Result<(StatusCode, String)> {
    let response = client.get(format!("{}{rest}", upstream.url())).header("Authorization", "upstream-key").send().await?;
    Ok((response.status(), response.text().await?))
}

async fn sign(client: &Client, upstream: &Simulator, message: &str) -> reqwest::Result<(StatusCode, String)> {
    get(client, upstream, &format!("/crypto/sign?message={}", encoded(message))).await
}

#[tokio::test]
async fn any_text_is_signed_as_sent_and_verifies_here_and_over_http() {
    let (client, upstream) = (client(), reliable().await);
    let long = "é+&%\0\n😀".repeat(300);
    for message in ["hello", "a b+c&d=e%20f", "line\nbreak\0nul", "😀", long.as_str()] {
        let (status, signature) = sign(&client, &upstream, message).await.unwrap();
        assert_eq!(status, StatusCode::OK);
        assert!(upstream.verify(message.as_bytes(), signature.as_bytes()), "{message:?}");
        assert_eq!(signature, upstream.signature(message.as_bytes()));
        let query = format!("/crypto/verify?message={}&signature={signature}", encoded(message));
        assert_eq!(get(&client, &upstream, &query).await.unwrap(), (StatusCode::OK, "ok".to_owned()));
        assert_eq!(get(&client, &upstream, &format!("{query}x")).await.unwrap().0, StatusCode::BAD_REQUEST);
    }
}

#[tokio::test]
async fn a_plus_that_was_not_encoded_signs_another_message() {
    let (client, upstream) = (client(), reliable().await);
    let (_, signature) = get(&client, &upstream, "/crypto/sign?message=1+1").await.unwrap();
    assert!(!upstream.verify(b"1+1", signature.as_bytes()));
    assert!(upstream.verify(b"1 1", signature.as_bytes()));
    for nothing in ["/crypto/sign", "/crypto/sign?message=", "/crypto/sign?message=%FF", "/crypto/sign?message=%4"] {
        assert_eq!(get(&client, &upstream, nothing).await.unwrap().0, StatusCode::BAD_REQUEST, "{nothing}");
    }
}

#[tokio::test]
async fn every_route_but_the_underscored_ones_needs_the_key() {
    let (client, upstream) = (client(), reliable().await);
    for route in ["/", "/crypto/sign?message=a", "/crypto/verify?message=a&signature=b"] {
        for key in [None, Some("wrong"), Some("Bearer upstream-key")] {
            let mut request = client.get(format!("{}{route}", upstream.url()));
            if let Some(key) = key {
                request = request.header("Authorization", key);
            }
            assert_eq!(request.send().await.unwrap().status(), StatusCode::UNAUTHORIZED, "{route} {key:?}");
        }
    }
    assert_eq!(get(&client, &upstream, "/").await.unwrap().0, StatusCode::OK);
    let audit: Audit = client.get(format!("{}/_audit", upstream.url())).send().await.unwrap().json_body().await;
    assert_eq!((audit.calls, audit.by_status["401"]), (6, 6), "refused calls count; the root and the audit do not");
}

#[tokio::test]
async fn an_outage_belongs_to_one_message_and_ends() {
    let options = SimulatorOptions {
        failure_probability: 1.0,
        outage: Duration::from_millis(300)..=Duration::from_millis(300),
        ..SimulatorOptions::reliable()
    };
    let (client, upstream) = (client(), Simulator::start(ANY_PORT, options).await.unwrap());
    assert_eq!(sign(&client, &upstream, "a").await.unwrap(), (StatusCode::BAD_GATEWAY, DEGRADED.to_owned()));
    let mut calls = 1;
    while sign(&client, &upstream, "a").await.unwrap().0 == StatusCode::BAD_GATEWAY {
        calls += 1;
    }
    let audit = upstream.audit();
    let times: Vec<u64> = audit.recent.iter().map(|call| call.at_ms).collect();
    assert!(times.last().unwrap() - times[0] >= 299, "{times:?}");
    assert_eq!((audit.by_status["502"], audit.by_status["200"], audit.signed_twice), (calls, 1, 0));
    assert_eq!(sign(&client, &upstream, "b").await.unwrap().0, StatusCode::BAD_GATEWAY);
    assert_eq!(upstream.outages().len(), 2);
    sign(&client, &upstream, "a").await.unwrap();
    assert_eq!(upstream.audit().signed_twice, 1);
}

#[tokio::test]
async fn the_budget_is_enforced_by_arrival_and_verify_spends_it() {
    let options = SimulatorOptions { rate: "3/1h".parse().unwrap(), ..SimulatorOptions::reliable() };
    let (client, upstream) = (client(), Simulator::start(ANY_PORT, options).await.unwrap());
    sign(&client, &upstream, "a").await.unwrap();
    get(&client, &upstream, "/crypto/verify?message=a&signature=b").await.unwrap();
    sign(&client, &upstream, "b").await.unwrap();
    let refused = client.get(format!("{}/crypto/sign?message=c", upstream.url())).header("Authorization", "upstream-key").send();
    let refused = refused.await.unwrap();
    assert_eq!(refused.status(), StatusCode::TOO_MANY_REQUESTS);
    let wait: u64 = refused.headers()["retry-after"].to_str().unwrap().parse().unwrap();
    assert!((3590..=3600).contains(&wait), "{wait}");
    let audit = upstream.audit();
    assert_eq!((audit.calls, audit.limit, audit.max_in_window, audit.over_budget, audit.verify_calls), (4, 3, 4, 1, 1));

    upstream.reset_audit();
    assert_eq!(upstream.audit().calls, 0);
    assert_eq!(sign(&client, &upstream, "d").await.unwrap().0, StatusCode::TOO_MANY_REQUESTS, "a reset of the audit gives no budget");
}

#[tokio::test]
async fn every_fault_is_what_it_says_and_ends_when_it_is_used_up() {
    let (client, upstream) = (client(), reliable().await);
    let set = async |kind| upstream.set_faults(Faults::one(kind, When::Next(1))).await.unwrap();

    set(FaultKind::Hang).await;
    let hanging = tokio::time::timeout(Duration::from_millis(200), sign(&client, &upstream, "hang"));
    assert!(hanging.await.is_err());

    set(FaultKind::Reset).await;
    assert_eq!(raw_call(&upstream).await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);
    set(FaultKind::Close).await;
    assert_eq!(raw_call(&upstream).await.unwrap(), "");

    set(FaultKind::Truncate).await;
    let answer = raw_call(&upstream).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let whole = upstream.signature(b"raw");
    assert!(head.starts_with("HTTP/1.1 200") && head.contains(&format!("content-length: {}", whole.len())), "{head}");
    assert!(whole.starts_with(body) && !body.is_empty() && body.len() < whole.len(), "{body}");
    set(FaultKind::Truncate).await;
    assert!(sign(&client, &upstream, "cut").await.unwrap_err().is_decode());

    for (kind, status) in
        [(FaultKind::TooMany { retry_after: 7 }, 429), (FaultKind::Unauthorized, 401), (FaultKind::Error, 500), (FaultKind::Outage, 502)]
    {
        set(kind).await;
        assert_eq!(sign(&client, &upstream, "a").await.unwrap().0, status, "{kind:?}");
    }
    assert_eq!(sign(&client, &upstream, "a").await.unwrap().0, StatusCode::OK);
    let audit = upstream.audit();
    assert_eq!((audit.calls, audit.by_status["none"], audit.max_in_flight_per_message), (10, 3, 1));
    assert_eq!(audit.signed_twice, 0, "a truncated answer is not a signature");
}

#[tokio::test]
async fn an_upstream_that_is_gone_refuses_connections_and_comes_back_on_its_port() {
    let (client, upstream) = (client(), reliable().await);
    sign(&client, &upstream, "kept alive").await.unwrap();
    upstream.set_faults(Faults { gone: true, ..Faults::default() }).await.unwrap();
    assert!(sign(&client, &upstream, "a").await.unwrap_err().is_connect());
    upstream.set_faults(Faults::default()).await.unwrap();
    assert_eq!(sign(&client, &upstream, "a").await.unwrap().0, StatusCode::OK);

    upstream.set_faults(Faults { drop_connections: Some(When::Always), ..Faults::default() }).await.unwrap();
    assert!(sign(&client, &upstream, "b").await.is_err());
    upstream.set_faults(Faults::default()).await.unwrap();
    assert_eq!(sign(&client, &upstream, "b").await.unwrap().0, StatusCode::OK);
    assert_eq!(upstream.audit().calls, 3, "a call that never arrived is not one");
}

#[tokio::test]
async fn faults_and_the_audit_are_reached_over_http() {
    let (client, upstream) = (client(), reliable().await);
    let control = |path: &str| format!("{}/{path}", upstream.url());
    let put = async |body: &'static str| client.put(control("_faults")).body(body).send().await.unwrap().status();

    assert_eq!(put(r#"{"calls":[{"kind":"error","when":"always"}]}"#).await, StatusCode::NO_CONTENT);
    assert_eq!(sign(&client, &upstream, "a").await.unwrap().0, StatusCode::INTERNAL_SERVER_ERROR);
    assert_eq!(client.delete(control("_faults")).send().await.unwrap().status(), StatusCode::NO_CONTENT);
    assert_eq!(sign(&client, &upstream, "a").await.unwrap().0, StatusCode::OK);
    assert_eq!(put(r#"{"calls":[{"kind":"none such","when":"always"}]}"#).await, StatusCode::BAD_REQUEST);

    assert_eq!(put(r#"{"goneForMs":300}"#).await, StatusCode::NO_CONTENT);
    let mut refused = 0;
    while let Err(error) = sign(&client, &upstream, "a").await {
        refused += u32::from(error.is_connect());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(refused > 0);

    let audit: Audit = client.get(control("_audit")).send().await.unwrap().json_body().await;
    assert_eq!(audit.recent.len(), 3);
    let since = audit.recent[2].at_ms;
    let later: Audit = client.get(control(&format!("_audit?since={since}"))).send().await.unwrap().json_body().await;
    assert_eq!((later.calls, later.recent[0].at_ms), (1, since));
    assert_eq!(later.recent[0].message_digest.as_deref().map(str::len), Some(64));
    assert_eq!(client.delete(control("_audit")).send().await.unwrap().status(), StatusCode::NO_CONTENT);
    assert_eq!(upstream.audit().calls, 0);
}

#[tokio::test]
async fn calls_for_one_message_at_once_are_counted_and_a_client_that_left_is_not_under_way() {
    let (client, upstream) = (client(), reliable().await);
    upstream.set_faults(Faults { calls: vec![Fault { kind: FaultKind::Hang, when: When::Next(1) }], ..Faults::default() }).await.unwrap();
    let left = tokio::time::timeout(Duration::from_millis(100), sign(&client, &upstream, "a")).await;
    assert!(left.is_err());
    while upstream.audit().calls < 1 {
        tokio::task::yield_now().await;
    }
    // The server notices the closed connection a moment after the client closed it.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        upstream.reset_audit();
        sign(&client, &upstream, "a").await.unwrap();
        if upstream.audit().max_in_flight_per_message == 1 {
            break;
        }
        assert!(Instant::now() < deadline, "the call of a client that left is still under way");
    }
}

/// Makes one call over a raw socket, and returns everything received until the end.
async fn raw_call(upstream: &Simulator) -> std::io::Result<String> {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut socket = tokio::net::TcpStream::connect(upstream.addr()).await?;
    socket.write_all(b"GET /crypto/sign?message=raw HTTP/1.1\r\nHost: x\r\nAuthorization: upstream-key\r\n\r\n").await?;
    let mut text = String::new();
    socket.read_to_string(&mut text).await?;
    Ok(text)
}

/// `reqwest` is built without its `json` feature.
trait JsonBody {
    async fn json_body<T: serde::de::DeserializeOwned>(self) -> T;
}

impl JsonBody for reqwest::Response {
    async fn json_body<T: serde::de::DeserializeOwned>(self) -> T {
        serde_json::from_slice(&self.bytes().await.unwrap()).unwrap()
    }
}
