//! Deliveries by the real worker: nothing is lost, no receiver delays another, and they are as fast as the settings allow.

use std::time::{Duration, Instant, SystemTime};

use devkit::processes::Signal;
use devkit::receiver::{Behaviour, Misbehaviour, Receiver, ReceiverOptions};
use devkit::upstream::SimulatorOptions;
use shared::contract::{DeliveryOutcome, WebhookStatus};
use shared::standard_webhooks::WebhookSecret;
use shared::store::deliveries::Replay;
use shared::store::keys::Changed;

use crate::world::{PATIENCE, SECRET, World, until};

async fn reliable() -> World {
    World::new(SimulatorOptions::reliable(), "1000/1s").await
}

async fn receiver() -> Receiver {
    Receiver::start("127.0.0.1:0".parse().unwrap(), ReceiverOptions { secret: Some(SECRET.to_owned()) }).await.unwrap()
}

fn latency(milliseconds: u64) -> Behaviour {
    Behaviour { latency_ms: milliseconds, ..Behaviour::default() }
}

#[tokio::test]
async fn a_worker_killed_between_sending_and_finishing_sends_again_with_the_same_id() {
    let world = reliable().await;
    let mut first = world.worker(&[("WEBHOOK_TIMEOUT", "500ms")]);
    world.signed("known").await;
    world.receiver.set_behaviour_of("/killed", Behaviour { first: Some(1), ..Behaviour::always(Misbehaviour::Hang) });
    let ids = world.post_to([("known".to_owned(), world.receiver.url("/killed"))]).await;
    let arrived =
        |count| move |all: &[devkit::receiver::Delivery]| all.iter().filter(|delivery| delivery.path == "/killed").count() >= count;
    world.receiver.wait_for(PATIENCE, arrived(1)).await.unwrap();
    first.kill().await.unwrap();
    let _second = world.worker(&[("WEBHOOK_TIMEOUT", "500ms")]);
    let all = world.receiver.wait_for(PATIENCE, arrived(2)).await.unwrap();
    let sent: Vec<_> = all.iter().filter(|delivery| delivery.path == "/killed").collect();
    assert!(sent.iter().all(|delivery| delivery.verified && delivery.webhook_id == sent[0].webhook_id));
    assert!(sent[1].timestamp > sent[0].timestamp, "signed anew");
    until("the log says so", async || world.log(ids[0]).await.deliveries.len() == 2).await;
    until("it is delivered", async || world.log(ids[0]).await.webhook.unwrap().status == WebhookStatus::Delivered).await;
    let outcomes: Vec<_> = world.log(ids[0]).await.deliveries.iter().map(|attempt| attempt.outcome).collect();
    assert_eq!(outcomes, [DeliveryOutcome::Unknown, DeliveryOutcome::Delivered]);
}

#[tokio::test]
async fn a_receiver_that_crashes_before_it_answers_gets_the_webhook_again_with_the_same_id() {
    let world = reliable().await;
    let _worker = world.worker(&[]);
    world.receiver.set_behaviour(Behaviour { first: Some(1), ..Behaviour::always(Misbehaviour::Drop) });
    world.post(["crash".to_owned()]).await;
    let all = world.receiver.wait_for(PATIENCE, |all| all.len() >= 2).await.unwrap();
    assert!(all.iter().all(|delivery| delivery.verified && delivery.webhook_id == all[0].webhook_id));
}

#[tokio::test]
async fn a_worker_that_is_told_to_stop_gives_back_webhooks_that_wait_for_their_turn() {
    let world = reliable().await;
    let mut first = world.worker(&[("WEBHOOK_CONCURRENCY", "1"), ("SHUTDOWN_GRACE", "20s")]);
    world.signed("known").await;
    let to_turn = || world.receiver.count(|delivery| delivery.path == "/turn");
    let known = world.post_to([("known".to_owned(), world.receiver.url("/turn"))]).await;
    until("the receiver is known to work", async || world.log(known[0]).await.webhook.unwrap().status == WebhookStatus::Delivered).await;
    world.receiver.set_behaviour(latency(2_000));
    let ids = world.post_to((0..4).map(|_| ("known".to_owned(), world.receiver.url("/turn")))).await;
    until("all are leased", async || {
        let mut leased = 0;
        for id in &ids {
            leased += world.log(*id).await.deliveries.len();
        }
        leased == 4
    })
    .await;
    first.signal(Signal::Term).unwrap();
    assert_eq!(first.wait_exit(PATIENCE).await.unwrap().code(), Some(0));
    assert_eq!(to_turn(), 1 + 1, "the one that was under way, and no other");
    world.receiver.set_behaviour(latency(0));
    let _second = world.worker(&[]);
    for id in ids {
        until("it is delivered", async || world.log(id).await.webhook.unwrap().status == WebhookStatus::Delivered).await;
    }
    assert_eq!(to_turn(), 1 + 4, "each once");
}

#[tokio::test]
async fn a_webhook_is_sent_again_on_request_and_gone_ends_it() {
    let world = reliable().await;
    let _worker = world.worker(&[]);
    world.receiver.set_behaviour(Behaviour { first: Some(1), ..Behaviour::always(Misbehaviour::Status { status: 410 }) });
    let ids = world.post(["gone".to_owned()]).await;
    until("it is exhausted", async || world.log(ids[0]).await.webhook.unwrap().status == WebhookStatus::Exhausted).await;
    assert_eq!(world.receiver.deliveries().len(), 1, "410 is not tried again");
    assert_eq!(world.store.replay(ids[0], None).await.unwrap(), Replay::Sending);
    until("it is delivered", async || world.log(ids[0]).await.webhook.unwrap().status == WebhookStatus::Delivered).await;
    let sent = world.receiver.deliveries();
    assert_eq!((sent.len(), &sent[0].webhook_id), (2, &sent[1].webhook_id));
}

#[tokio::test]
async fn a_secret_that_is_rotated_while_a_delivery_is_in_flight_loses_nothing_and_both_verify_until_the_grace_ends() {
    let world = reliable().await;
    let _worker = world.worker(&[]);
    world.signed("known").await;
    // The first delivery is signed with the old secret, and fails after the rotation; the second is signed with both.
    world.receiver.set_behaviour_of("/rotated", Behaviour { latency_ms: 300, ..Behaviour::fail_first(1, 500) });
    world.post_to([("known".to_owned(), world.receiver.url("/rotated"))]).await;
    let to =
        |path: &'static str, count| move |all: &[devkit::receiver::Delivery]| all.iter().filter(|one| one.path == path).count() >= count;
    world.receiver.wait_for(PATIENCE, to("/rotated", 1)).await.unwrap();
    let new = WebhookSecret::generate();
    assert_eq!(world.store.rotate_webhook_secret("test", &new, Duration::from_hours(1)).await.unwrap(), Changed::Done);
    let all = world.receiver.wait_for(PATIENCE, to("/rotated", 2)).await.unwrap();
    let [first, second] = [0, 1].map(|n| all.iter().filter(|one| one.path == "/rotated").nth(n).unwrap().clone());
    let verifies = |secret: &str, delivery: &devkit::receiver::Delivery| {
        standardwebhooks::Webhook::new(secret).unwrap().verify(&delivery.raw, &delivery.headers).is_ok()
    };
    assert!(verifies(SECRET, &first) && !verifies(&new.expose_text(), &first));
    assert!(verifies(SECRET, &second) && verifies(&new.expose_text(), &second));
    // Without a grace period the old secret is dropped at once.
    let newest = WebhookSecret::generate();
    assert_eq!(world.store.rotate_webhook_secret("test", &newest, Duration::ZERO).await.unwrap(), Changed::Done);
    world.post_to([("known".to_owned(), world.receiver.url("/after"))]).await;
    let all = world.receiver.wait_for(PATIENCE, to("/after", 1)).await.unwrap();
    let after = all.iter().find(|one| one.path == "/after").unwrap();
    assert!(verifies(&newest.expose_text(), after) && !verifies(SECRET, after) && !verifies(&new.expose_text(), after));
}

#[tokio::test]
async fn a_receiver_that_refuses_each_first_try_gets_each_second_one_when_the_schedule_says() {
    let world = reliable().await;
    let _worker = world.worker(&[("WEBHOOK_RETRY_SCHEDULE", "500ms,1h")]);
    world.signed("known").await;
    let receiver = receiver().await;
    receiver.set_behaviour_of("/refuses", Behaviour::fail_first(1, 500));
    let posted = Instant::now();
    world.post_to((0..20).map(|_| ("known".to_owned(), receiver.url("/refuses")))).await;
    receiver.wait_for(PATIENCE, |all| all.iter().filter(|one| one.path == "/refuses").count() == 40).await.unwrap();
    assert!(posted.elapsed() < PATIENCE, "{:?}", posted.elapsed());
}

#[tokio::test]
async fn an_address_that_hangs_delays_no_other_one_of_its_server() {
    hangs_alone("64").await;
}

#[tokio::test]
async fn an_address_that_hangs_delays_no_other_one_even_if_few_calls_may_be_made() {
    hangs_alone("2").await;
}

async fn hangs_alone(concurrency: &str) {
    let world = reliable().await;
    let _worker = world.worker(&[("WEBHOOK_TIMEOUT", "10s"), ("WEBHOOK_CONCURRENCY", concurrency)]);
    world.signed("known").await;
    let receiver = receiver().await;
    receiver.set_behaviour_of("/hangs", Behaviour::always(Misbehaviour::Hang));
    world.post_to((0..10).map(|_| ("known".to_owned(), receiver.url("/hangs")))).await;
    let to = |path: &'static str| move |all: &[devkit::receiver::Delivery]| all.iter().any(|one| one.path == path);
    receiver.wait_for(PATIENCE, to("/hangs")).await.unwrap();
    let posted = Instant::now();
    world.post_to([("known".to_owned(), receiver.url("/answers"))]).await;
    receiver.wait_for(PATIENCE, to("/answers")).await.unwrap();
    assert!(posted.elapsed() < Duration::from_secs(8), "{:?}", posted.elapsed());
}

/// Sends two deliveries to each of ten receivers every 100 ms for two seconds. Returns the 99th percentile of the time from the insert to
/// the arrival at the nine healthy receivers.
async fn p99(hanging: bool) -> Duration {
    let world = reliable().await;
    let _worker = world.worker(&[("WEBHOOK_TIMEOUT", "5s")]);
    world.signed("known").await;
    let mut receivers = Vec::new();
    for _ in 0..10 {
        let receiver = receiver().await;
        receiver.set_behaviour(latency(50));
        receivers.push(receiver);
    }
    // All of them are known to work, so the one that hangs is trusted at first.
    world.post_to(receivers.iter().map(|receiver| ("known".to_owned(), receiver.url("/")))).await;
    for receiver in &receivers {
        receiver.wait_for(PATIENCE, |all| !all.is_empty()).await.unwrap();
    }
    if hanging {
        receivers[0].set_behaviour(Behaviour::always(Misbehaviour::Hang));
    }
    let mut inserted = std::collections::HashMap::new();
    let mut ticks = tokio::time::interval(Duration::from_millis(100));
    for _ in 0..20 {
        ticks.tick().await;
        let targets = receivers.iter().flat_map(|receiver| [receiver.url("/"), receiver.url("/")]).map(|url| ("known".to_owned(), url));
        let now = SystemTime::now();
        inserted.extend(world.post_to(targets).await.into_iter().map(|id| (format!("msg_{}", id.simple()), now)));
    }
    let mut times = Vec::new();
    for receiver in &receivers[1..] {
        let all = receiver.wait_for(PATIENCE, |all| all.len() > 40).await.unwrap();
        let sent_at = |one: &devkit::receiver::Delivery| inserted.get(&one.webhook_id).copied();
        times.extend(all.iter().filter_map(|one| Some(one.received_at.duration_since(sent_at(one)?).unwrap())));
    }
    assert_eq!(times.len(), 360);
    times.sort_unstable();
    times[times.len() * 99 / 100]
}

/// Makes tests that measure run one after the other.
static MEASURING: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn with_one_of_ten_receivers_hanging_the_other_nine_are_told_as_fast_as_without() {
    let _alone = MEASURING.lock().await;
    // At the same time, so that what else the machine does delays both.
    let (without, with) = tokio::join!(p99(false), p99(true));
    println!("p99 without a hanging receiver {without:?}, with one {with:?}");
    assert!(with <= without.mul_f64(1.5).max(Duration::from_millis(50)), "{with:?} with a hanging receiver, {without:?} without");
}

#[tokio::test(flavor = "multi_thread")]
async fn receivers_that_answer_well_but_slowly_delay_nobody_else() {
    let _alone = MEASURING.lock().await;
    let world = reliable().await;
    let _worker = world.worker(&[]);
    world.signed("known").await;
    // Every address of 127.0.0.0/8 is a receiver of its own.
    let all_addresses = ReceiverOptions { secret: Some(SECRET.to_owned()) };
    let slow = Receiver::start("0.0.0.0:0".parse().unwrap(), all_addresses).await.unwrap();
    slow.set_behaviour(latency(3000));
    let port = slow.addr().port();
    let targets = (0..40).flat_map(|_| 2..=6).map(|host| ("known".to_owned(), format!("http://127.0.0.{host}:{port}/")));
    world.post_to(targets).await;
    // Each has answered once, so it is known to work.
    slow.wait_for(PATIENCE, |all| all.len() >= 10).await.unwrap();
    for n in 0..20 {
        let posted = SystemTime::now();
        world.post_to([("known".to_owned(), world.receiver.url(&format!("/quick{n}")))]).await;
        let path = format!("/quick{n}");
        let all = world.receiver.wait_for(PATIENCE, |all| all.iter().any(|one| one.path == path)).await.unwrap();
        let took = all.iter().find(|one| one.path == path).unwrap().received_at.duration_since(posted).unwrap();
        assert!(took < Duration::from_secs(1), "{took:?}");
    }
}

/// Makes `concurrency` deliveries at a time to a receiver that takes `milliseconds`. Returns how many there are per second, and how many
/// seconds each takes, from the look-up to the end of the answer.
async fn rate(concurrency: u16, milliseconds: u64, count: u16) -> (f64, f64) {
    let (number, count) = (f64::from(count), usize::from(count));
    let world = reliable().await;
    let concurrent = concurrency.to_string();
    let _worker = world.worker(&[("WEBHOOK_CONCURRENCY", &concurrent), ("WEBHOOK_RECEIVER_CONCURRENCY", &concurrent)]);
    world.signed("known").await;
    world.receiver.set_behaviour(latency(milliseconds));
    let ids = world.post_to((0..count).map(|n| ("known".to_owned(), world.receiver.url(&format!("/{n:04}"))))).await;
    // Not with `wait_for`, which checks all deliveries after each one.
    until("all have arrived", async || world.receiver.count(|_| true) > count).await;
    let all = world.receiver.deliveries();
    let mut arrivals: Vec<SystemTime> = all.iter().filter(|one| one.path != "/signed").map(|one| one.received_at).collect();
    arrivals.sort_unstable();
    // The middle, without the first and the last tenth.
    let (from, to) = (count / 10, count * 9 / 10);
    let took = arrivals[to].duration_since(arrivals[from]).unwrap();
    let mut latency = 0.0;
    for id in &ids {
        until("it is written", async || world.log(*id).await.deliveries[0].duration_ms.is_some()).await;
        // Whole milliseconds, rounded down.
        latency += (f64::from(world.log(*id).await.deliveries[0].duration_ms.unwrap()) + 0.5) / 1000.0 / number;
    }
    (f64::from(u32::try_from(to - from).unwrap()) / took.as_secs_f64(), latency)
}

#[tokio::test(flavor = "multi_thread")]
async fn as_many_deliveries_are_under_way_as_may_be() {
    let _alone = MEASURING.lock().await;
    for (concurrency, milliseconds, count) in [(16, 100, 480), (4, 10, 1000)] {
        let (rate, latency) = rate(concurrency, milliseconds, count).await;
        let possible = f64::from(concurrency) / latency;
        println!(
            "{concurrency} at a time, {milliseconds} ms ({:.1} ms with the way): {rate:.0} a second, of {possible:.0}",
            latency * 1000.0
        );
        assert!(rate >= possible * 0.9, "{rate} a second, of {possible}");
    }
}
