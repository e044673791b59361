//! Malicious receivers: each is bounded, each is recorded, and no other receiver is delayed.

use std::time::{Duration, Instant};

use devkit::receiver::{Hostile, Hostility};
use devkit::upstream::SimulatorOptions;
use shared::contract::{DeliveryOutcome, WebhookStatus};

use crate::world::{World, until};

/// What is recorded of a delivery: its outcome, the status code, and the class of the error.
type Recorded = (DeliveryOutcome, Option<u16>, Option<&'static str>);

fn suite() -> Vec<(Hostility, &'static str, Recorded)> {
    use DeliveryOutcome::{Delivered, Failed};
    vec![
        (Hostility::EndlessHeaders, "http", (Failed, None, Some("reset"))),
        (Hostility::SlowHeaders, "http", (Failed, None, Some("timeout"))),
        // 2xx is a success, whatever follows.
        (Hostility::EndlessBody, "http", (Delivered, Some(200), Some("body"))),
        (Hostility::HugeBody, "http", (Delivered, Some(200), None)),
        (Hostility::Redirects, "http", (Failed, Some(307), Some("status"))),
        (Hostility::Stall, "https", (Failed, None, Some("timeout"))),
        (Hostility::Stall, "http", (Failed, None, Some("timeout"))),
        (Hostility::HangUp, "http", (Failed, None, Some("reset"))),
        (Hostility::HangUp, "https", (Failed, None, Some("connection"))),
        (Hostility::RetryAfter("99999999".to_owned()), "http", (Failed, Some(429), Some("status"))),
        (Hostility::RetryAfter("99999999999999999999999999".to_owned()), "http", (Failed, Some(429), Some("status"))),
        (Hostility::RetryAfter("garbage".to_owned()), "http", (Failed, Some(429), Some("status"))),
        (Hostility::RetryAfter("-1".to_owned()), "http", (Failed, Some(429), Some("status"))),
    ]
}

#[tokio::test]
async fn every_hostile_receiver_is_bounded_and_recorded_and_delays_nobody_else() {
    let world = World::new(SimulatorOptions::reliable(), "1000/1s").await;
    let limits = [("WEBHOOK_CONNECT_TIMEOUT", "2s"), ("WEBHOOK_HEADERS_TIMEOUT", "2500ms"), ("WEBHOOK_TIMEOUT", "3s")];
    let _worker = world.worker(&[limits.as_slice(), &[("WEBHOOK_RETRY_SCHEDULE", "1h")]].concat());
    world.signed("known").await;
    let mut hostiles = Vec::new();
    for (hostility, scheme, expected) in suite() {
        let hostile = Hostile::start(hostility.clone()).await.unwrap();
        let url = hostile.url(scheme);
        hostiles.push((hostility, scheme, expected, hostile, url));
    }
    let urls = hostiles.iter().map(|(.., url)| ("known".to_owned(), url.clone()));
    let ids = world.post_to(urls).await;
    until("every hostile receiver was called", async || hostiles.iter().all(|(.., hostile, _)| hostile.connections() > 0)).await;

    let started = Instant::now();
    world.post_to((0..20).map(|n| ("known".to_owned(), world.receiver.url(&format!("/healthy/{n}"))))).await;
    let healthy = |all: &[devkit::receiver::Delivery]| all.iter().filter(|delivery| delivery.path.starts_with("/healthy")).count() == 20;
    world.receiver.wait_for(Duration::from_secs(20), healthy).await.unwrap();
    println!("twenty healthy deliveries took {:?}", started.elapsed());
    assert!(started.elapsed() < Duration::from_secs(2), "less than any hostile one: {:?}", started.elapsed());

    for (id, (hostility, scheme, (outcome, status, error), hostile, _)) in ids.into_iter().zip(hostiles) {
        let what = format!("{hostility:?} over {scheme}");
        until(&format!("{what} is recorded"), async || {
            world.log(id).await.deliveries.iter().any(|attempt| attempt.outcome != DeliveryOutcome::Sending)
        })
        .await;
        let log = world.log(id).await;
        let attempt = &log.deliveries[0];
        assert_eq!((attempt.outcome, attempt.status, attempt.error.as_deref()), (outcome, status, error), "{what}");
        assert!(attempt.duration_ms.unwrap() < 4000, "{what}: {attempt:?}");
        assert!(attempt.response.as_ref().is_none_or(|response| response.len() <= 2048), "{what}");
        assert_eq!(hostile.connections(), 1, "{what}: one delivery, one connection, no redirect followed");
        // The socket buffers of both sides take more than was asked for, but far less than ten gigabytes.
        assert!(hostile.sent() < 32 << 20, "{what}: {} bytes were taken", hostile.sent());
        let webhook = log.webhook.unwrap();
        if outcome == DeliveryOutcome::Delivered {
            assert_eq!(webhook.status, WebhookStatus::Delivered, "{what}");
        } else {
            // The schedule says an hour, plus or minus a fifth; a receiver that asks for years gets a day; nonsense is ignored.
            let hours = (webhook.next_attempt_at.unwrap() - time::OffsetDateTime::now_utc()).as_seconds_f64() / 3600.0;
            let asks_for_years = matches!(&hostility, Hostility::RetryAfter(text) if text.starts_with("9999"));
            let bounds = if asks_for_years { 23.9..=24.0 } else { 0.7..=1.2 };
            assert!(bounds.contains(&hours), "{what}: {hours} h");
        }
        if matches!(hostility, Hostility::HugeBody) {
            assert_eq!(attempt.response.as_ref().unwrap().len(), 2048);
        }
    }
}
