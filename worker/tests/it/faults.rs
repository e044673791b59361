//! Faults of the upstream and of receivers, and what becomes of a request.

use std::time::Duration;

use devkit::processes::Signal;
use devkit::receiver::{Behaviour, Misbehaviour};
use devkit::upstream::{FaultKind, SimulatorOptions, When};
use shared::contract::{Status, WebhookStatus};

use crate::world::{PATIENCE, World, numbered, until};

async fn reliable() -> World {
    World::new(SimulatorOptions::reliable(), "1000/1s").await
}

#[tokio::test]
async fn hangs_resets_truncated_bodies_and_errors_are_tried_again_and_leave_their_trace() {
    for (kind, class) in [
        (FaultKind::Hang, "timeout"),
        (FaultKind::Reset, "reset"),
        (FaultKind::Close, "reset"),
        (FaultKind::Truncate, "body"),
        (FaultKind::Error, "status"),
        (FaultKind::Outage, "status"),
    ] {
        let world = reliable().await;
        world.fault(kind, When::Next(2)).await;
        let _worker = world.worker(&[("UPSTREAM_TIMEOUT", "300ms")]);
        let ids = world.post(numbered(1)).await;
        let state = world.settled(&ids).await.remove(0);
        assert_eq!((state.status, state.attempts), (Status::Signed, 3), "{kind:?}");
        assert_eq!(state.last_error.unwrap().code, class, "{kind:?}");
        assert_eq!(world.upstream.audit().max_in_flight_per_message, 1);
    }
}

#[tokio::test]
async fn the_longest_message_that_may_be_posted_fits_into_the_address_of_a_call() {
    let world = reliable().await;
    let _worker = world.worker(&[]);
    // Each byte takes three in the address.
    let longest = "é".repeat(shared::message::LONGEST as usize / 2);
    let ids = world.post([longest.clone()]).await;
    let state = world.settled(&ids).await.remove(0);
    assert_eq!((state.status, state.attempts, state.message), (Status::Signed, 1, longest));
}

#[tokio::test]
async fn a_wrong_upstream_key_burns_no_attempts() {
    let world = reliable().await;
    world.fault(FaultKind::Unauthorized, When::Next(2)).await;
    let _worker = world.worker(&[]);
    let ids = world.post(numbered(3)).await;
    let states = world.settled(&ids).await;
    assert!(states.iter().all(|state| state.status == Status::Signed && state.attempts == 1), "{states:?}");
    assert!(world.upstream.audit().sign_calls <= 6, "{:?}", world.upstream.audit());
}

#[tokio::test]
async fn an_upstream_whose_host_answers_nothing_at_all_burns_no_attempts() {
    let world = reliable().await;
    // A listener whose queue is full: Linux drops new connections, like a firewall or a host that is gone.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let silent = socket.listen(1).unwrap();
    let address = silent.local_addr().unwrap();
    let mut queue = Vec::new();
    while let Ok(connected) = tokio::time::timeout(Duration::from_millis(500), tokio::net::TcpStream::connect(address)).await {
        queue.push(connected.unwrap());
    }
    let mut worker = world.worker(&[("UPSTREAM_URL", &format!("http://{address}")), ("UPSTREAM_TIMEOUT", "2s")]);
    let ids = world.post(numbered(1)).await;
    until("the circuit breaker is open", async || world.store.upstream().await.unwrap().is_some_and(|state| state.breaker.is_some())).await;
    // While a probe is under way, it counts as an attempt.
    worker.signal(Signal::Term).unwrap();
    assert_eq!(worker.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", worker.log());
    let state = world.states(&ids).await.remove(0);
    assert_eq!((state.status, state.attempts), (Status::Pending, 0));
    assert_eq!(state.last_error.unwrap().code, "connection");
}

#[tokio::test]
async fn out_of_attempts_a_request_fails_and_its_webhook_says_so() {
    let world = reliable().await;
    world.fault(FaultKind::Outage, When::Always).await;
    let _worker = world.worker(&[("SIGN_MAX_ATTEMPTS", "3"), ("SIGN_RETRY_STRATEGY", "fixed")]);
    let ids = world.post(numbered(1)).await;
    let state = world.settled(&ids).await.remove(0);
    assert_eq!((state.status, state.attempts), (Status::Failed, 3));
    assert_eq!(state.last_error.unwrap().code, "attempts-exhausted");
    let delivery = world.receiver.wait_for(PATIENCE, |all| !all.is_empty()).await.unwrap().remove(0);
    assert!(delivery.verified, "{:?}", delivery.refusal);
    assert_eq!(delivery.body["type"], "signature.failed");
    assert_eq!(delivery.body["data"]["lastError"]["code"], "attempts-exhausted");
}

#[tokio::test]
async fn past_its_deadline_a_request_fails() {
    let world = reliable().await;
    world.fault(FaultKind::Outage, When::Always).await;
    let _worker = world.worker(&[("SIGN_DEADLINE", "1s"), ("SIGN_RETRY_STRATEGY", "exponential")]);
    let ids = world.post(numbered(2)).await;
    let states = world.settled(&ids).await;
    assert!(states.iter().all(|state| state.last_error.as_ref().unwrap().code == "deadline-exceeded"), "{states:?}");
}

#[tokio::test]
async fn workers_with_one_queue_each_do_the_work_together_and_neither_does_the_others() {
    let world = reliable().await;
    let signing = world.worker(&[("WORKER_QUEUES", "sign")]);
    let signed = world.post(numbered(1)).await;
    world.settled(&signed).await;
    drop(signing);
    assert!(world.receiver.deliveries().is_empty(), "the one that signs tells nobody");
    let tells = world.worker(&[("WORKER_QUEUES", "webhook")]);
    let ids = world.post((0..5).map(|n| format!("later {n}"))).await;
    world.receiver.wait_for(PATIENCE, |all| all.len() == 1).await.unwrap();
    assert!(world.states(&ids).await.iter().all(|state| state.attempts == 0), "the one that tells signs nothing");
    assert_eq!(world.upstream.audit().sign_calls, 1);
    let signs = world.worker(&[("WORKER_QUEUES", "sign")]);
    assert!(world.settled(&ids).await.iter().all(|state| state.status == Status::Signed));
    let deliveries = world.receiver.wait_for(PATIENCE, |all| all.len() >= 6).await.unwrap();
    assert!(deliveries.iter().all(|delivery| delivery.verified));
    for mut worker in [tells, signs] {
        worker.signal(Signal::Term).unwrap();
        assert_eq!(worker.wait_exit(PATIENCE).await.unwrap().code(), Some(0), "{}", worker.log());
    }
}

#[tokio::test]
async fn a_receiver_that_hangs_drops_or_redirects_is_tried_again_and_then_kept() {
    for (misbehaviour, status) in [
        (Misbehaviour::Hang, None),
        (Misbehaviour::Drop, None),
        (Misbehaviour::Redirect { location: "http://127.0.0.1:1/".to_owned() }, Some(302)),
        (Misbehaviour::Status { status: 500 }, Some(500)),
    ] {
        let world = reliable().await;
        world.receiver.set_behaviour(Behaviour::always(misbehaviour.clone()));
        let _worker = world.worker(&[("WEBHOOK_TIMEOUT", "200ms"), ("WEBHOOK_RETRY_SCHEDULE", "50ms,50ms")]);
        let ids = world.post(numbered(1)).await;
        until("the delivery is exhausted", async || {
            world.states(&ids).await[0].webhook.as_ref().unwrap().status == WebhookStatus::Exhausted
        })
        .await;
        let webhook = world.states(&ids).await.remove(0).webhook.unwrap();
        assert_eq!((webhook.attempts, webhook.last_status), (3, status), "{misbehaviour:?}");
    }
}
