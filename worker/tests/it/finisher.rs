//! The finisher, against a real Postgres.

use std::time::Duration;

use devkit::upstream::SimulatorOptions;
use shared::contract::Status;
use shared::store::low_water::LowWater;
use shared::store::sign_claim::SignJob;
use shared::store::sign_finish::{Call, SignEnding, SignFinish, UpstreamNews};
use shared::store::upstream::WorkerId;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use uuid::Uuid;
use worker::finisher::Finisher;

use crate::world::{World, numbered, until};

/// Outcomes of so many messages, fewer than ten, in their order, and not yet written.
async fn outcomes(world: &World, count: usize) -> Vec<SignFinish> {
    let rate = "10/1s".parse().unwrap();
    world.store.join_workers(WorkerId::generate(), rate).await.unwrap();
    let (mut claimed, _) = world.store.claim_sign_jobs(count, Duration::from_mins(5), rate, LowWater::default()).await.unwrap();
    claimed.jobs.sort_by_key(|job| job.message.text().to_owned());
    let finish = |job: SignJob| SignFinish {
        digest: job.message.digest(),
        lease: job.lease,
        ending: SignEnding::Signed("s".to_owned()),
        call: Call::Ended,
        status: Some(200),
        error: None,
        upstream: UpstreamNews::None,
    };
    claimed.jobs.into_iter().map(finish).collect()
}

/// The statement that holds the job of a request.
fn hold(request: Uuid) -> AssertSqlSafe<String> {
    AssertSqlSafe(format!("select from jobs where id = (select sign_job_id from requests where id = '{request}') for update"))
}

#[tokio::test]
async fn outcomes_that_are_held_up_hold_up_none_that_come_later() {
    let world = World::new(SimulatorOptions::reliable(), "10/1s").await;
    let ids = world.post(numbered(5)).await;
    let mut outcomes = outcomes(&world, 5).await;
    let mut connection = PgConnection::connect(world.database()).await.unwrap();
    let mut holding = connection.begin().await.unwrap();
    for id in &ids[..4] {
        sqlx::raw_sql(hold(*id)).execute(&mut *holding).await.unwrap();
    }
    let finisher = Finisher::new(world.store.clone());
    let free = outcomes.pop().unwrap();
    let finish_all =
        |outcomes: Vec<SignFinish>| futures_util::future::join_all(outcomes.into_iter().map(|outcome| finisher.finish(outcome)));
    // Two batches, as many as are written at the same time.
    let second = outcomes.split_off(2);
    tokio::join!(finish_all(outcomes), async {
        let mut watching = PgConnection::connect(world.database()).await.unwrap();
        until("somebody waits for the jobs", async || {
            let waiting = "select exists (select from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock')";
            sqlx::query_scalar(waiting).fetch_one(&mut watching).await.unwrap()
        })
        .await;
        tokio::join!(finish_all(second), async {
            finisher.finish(free).await;
            let states = world.states(&ids).await;
            assert_eq!(states.iter().filter(|state| state.status == Status::Signed).count(), 1, "it alone");
            holding.rollback().await.unwrap();
        });
    });
    assert!(world.states(&ids).await.iter().all(|state| state.status == Status::Signed));
}

#[tokio::test]
async fn an_outcome_whose_row_somebody_holds_holds_up_no_other() {
    let world = World::new(SimulatorOptions::reliable(), "10/1s").await;
    let ids = world.post(numbered(2)).await;
    let outcomes = outcomes(&world, 2).await;
    let mut held = PgConnection::connect(world.database()).await.unwrap();
    let mut holding = held.begin().await.unwrap();
    sqlx::raw_sql(hold(ids[0])).execute(&mut *holding).await.unwrap();

    let finisher = Finisher::new(world.store.clone());
    let all = futures_util::future::join_all(outcomes.into_iter().map(|outcome| finisher.finish(outcome)));
    let status = async |place: usize| world.states(&ids[place..=place]).await.remove(0).status;
    tokio::join!(all, async {
        until("the other one is written", async || status(1).await == Status::Signed).await;
        assert_eq!(status(0).await, Status::Pending);
        holding.rollback().await.unwrap();
        until("so is the one that was held", async || status(0).await == Status::Signed).await;
    });
}
