//! The upstream and the receivers over TLS, as in production. On Linux alone: elsewhere, no variable says what the system trusts.

use std::net::SocketAddr;
use std::sync::Arc;

use devkit::processes::Signal;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use rustls::ServerConfig;
use rustls::pki_types::PrivatePkcs8KeyDer;
use serde_json::json;
use tempfile::NamedTempFile;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use crate::world::{Binary, KEY, PATIENCE, World, answer, env, spawn, until};

/// Ends TLS in front of a plain server, with a certificate of its own for `localhost`. Dropping it stops it.
struct TlsFront {
    port: u16,
    /// The certificate, as PEM.
    certificate: NamedTempFile,
    _task: AbortOnDropHandle<()>,
}

impl TlsFront {
    async fn start(plain: SocketAddr) -> Self {
        let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let key = PrivatePkcs8KeyDer::from(signing_key.serialize_der());
        let config = ServerConfig::builder().with_no_client_auth().with_single_cert(vec![cert.der().clone()], key.into()).unwrap();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let acceptor = acceptor.clone();
                tokio::spawn(async move {
                    // It fails where the client does not trust the certificate.
                    let Ok(mut socket) = acceptor.accept(socket).await else { return };
                    let mut behind = TcpStream::connect(plain).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut socket, &mut behind).await;
                });
            }
        });
        let certificate = NamedTempFile::new().unwrap();
        std::fs::write(&certificate, cert.pem()).unwrap();
        Self { port, certificate, _task: AbortOnDropHandle::new(task) }
    }

    fn url(&self, path: &str) -> String {
        format!("https://localhost:{}{path}", self.port)
    }
}

fn address(url: &str) -> SocketAddr {
    url.parse::<url::Url>().unwrap().socket_addrs(|| None).unwrap()[0]
}

#[tokio::test]
async fn a_worker_without_any_certificate_to_trust_says_what_it_needs() {
    let settings = [
        ("DATABASE_URL", "postgres://nobody@127.0.0.1:1/nothing"),
        ("UPSTREAM_URL", "https://localhost:1"),
        ("UPSTREAM_API_KEY", "upstream-key"),
        ("SSL_CERT_FILE", "/does/not/exist"),
    ];
    let mut worker = spawn(Binary::Worker, &[], &env(&settings)).await;
    assert_eq!(worker.wait_exit(PATIENCE).await.unwrap().code(), Some(1));
    let log = worker.log();
    assert!(log.lines().count() == 1 && log.contains("No CA certificates") && log.contains("SSL_CERT_FILE"), "{log}");
}

#[tokio::test]
async fn an_upstream_that_the_system_does_not_trust_gets_no_call_and_the_log_says_why() {
    let mut world = World::new().await;
    world.worker.kill().await.unwrap();
    let upstream = TlsFront::start(address(&world.upstream.url())).await;
    let other = TlsFront::start(address(&world.upstream.url())).await;
    let settings = [("UPSTREAM_URL", &*upstream.url("")), ("SSL_CERT_FILE", other.certificate.path().to_str().unwrap())];
    let mut worker = world.another_worker(&env(&settings)).await;
    let id = answer(world.post(&json!({ "message": "m" })).header("Prefer", "respond-async").send().await.unwrap()).await.id();
    until("the circuit breaker is open", async || {
        let ready = world.client.get(format!("{}/health/ready", world.url)).send().await.unwrap();
        answer(ready).await.body["upstream"]["breaker"]["reason"] == "tls"
    })
    .await;
    // While a probe is under way, it counts as an attempt.
    worker.signal(Signal::Term).unwrap();
    assert_eq!(worker.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", worker.log());
    let state = answer(world.get(&id).await).await.body;
    assert_eq!((state["attempts"].as_u64(), state["lastError"]["code"].as_str()), (Some(0), Some("tls")), "{state}");
    assert_eq!(world.upstream.audit().calls, 0);
    assert!(worker.log().contains("invalid peer certificate"), "{}", worker.log());
}

#[tokio::test]
async fn over_tls_whom_the_system_trusts_is_called_and_a_stranger_is_told_nothing() {
    let mut world = World::new().await;
    world.worker.kill().await.unwrap();
    let upstream = TlsFront::start(address(&world.upstream.url())).await;
    let receiver = TlsFront::start(address(&world.hook("/"))).await;
    let stranger = TlsFront::start(address(&world.hook("/"))).await;
    let trusted = NamedTempFile::new().unwrap();
    let both = [&upstream, &receiver].map(|front| std::fs::read(&front.certificate).unwrap());
    std::fs::write(&trusted, both.concat()).unwrap();
    let settings = [
        ("UPSTREAM_URL", &*upstream.url("")),
        ("SSL_CERT_FILE", trusted.path().to_str().unwrap()),
        ("WEBHOOK_ALLOW_NETWORKS", "127.0.0.0/8,::1/128"),
    ];
    let worker = world.another_worker(&env(&settings)).await;

    let mut ids = Vec::new();
    for url in [stranger.url("/stranger"), receiver.url("/trusted")] {
        let posted = answer(world.post(&json!({ "message": "over TLS", "webhookUrl": url })).send().await.unwrap()).await;
        ids.push(posted.id());
    }
    assert_eq!(world.settled(&ids[1]).await["status"], "signed", "by an upstream that is reached over TLS alone");
    let delivered = world.deliveries(1).await;
    assert!(delivered[0].verified, "{delivered:?}");
    let mut log = serde_json::Value::Null;
    until("the stranger was tried", async || {
        let deliveries = world.client.get(format!("{}/crypto/sign/{}/deliveries", world.url, ids[0])).header("X-API-Key", KEY);
        log = answer(deliveries.send().await.unwrap()).await.body;
        log["deliveries"][0]["outcome"] == "failed"
    })
    .await;
    assert_eq!(log["deliveries"][0]["error"], "tls", "{log}");
    assert!(world.receiver.deliveries().iter().all(|delivery| delivery.path == "/trusted"));
    assert!(!worker.log().contains("ERROR"), "what is wrong with a receiver is its owner's error:\n{}", worker.log());
}
