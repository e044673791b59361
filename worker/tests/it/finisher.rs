//! The finisher, against a real Postgres.

use std::time::Duration;

use devkit::upstream::SimulatorOptions;
use shared::contract::Status;
use shared::store::low_water::LowWater;
use shared::store::sign_finish::{SignEnding, SignFinish, UpstreamNews};
use shared::store::upstream::WorkerId;
use sqlx::{AssertSqlSafe, Connection, PgConnection};
use worker::finisher::Finisher;

use crate::world::{World, numbered, until};

#[tokio::test]
async fn an_outcome_whose_row_somebody_holds_holds_up_no_other() {
    let world = World::new(SimulatorOptions::reliable(), "10/1s").await;
    let rate = "10/1s".parse().unwrap();
    world.store.join_workers(WorkerId::generate(), rate).await.unwrap();
    let ids = world.post(numbered(2)).await;
    let (claimed, _) = world.store.claim_sign_jobs(2, Duration::from_mins(5), rate, LowWater::default()).await.unwrap();
    let mut held = PgConnection::connect(world.database()).await.unwrap();
    let mut holding = held.begin().await.unwrap();
    let hold = format!("select from jobs where id = (select sign_job_id from requests where id = '{}') for update", ids[0]);
    sqlx::raw_sql(AssertSqlSafe(hold)).execute(&mut *holding).await.unwrap();

    let finisher = Finisher::new(world.store.clone());
    let finishes = claimed.jobs.into_iter().map(|job| {
        finisher.finish(SignFinish {
            digest: job.message.digest(),
            lease: job.lease,
            ending: SignEnding::Signed("s".to_owned()),
            called: true,
            status: Some(200),
            error: None,
            upstream: UpstreamNews::None,
        })
    });
    let all = futures_util::future::join_all(finishes);
    let status = async |place: usize| world.states(&ids[place..=place]).await.remove(0).status;
    tokio::join!(all, async {
        until("the other one is written", async || status(1).await == Status::Signed).await;
        assert_eq!(status(0).await, Status::Pending);
        holding.rollback().await.unwrap();
        until("so is the one that was held", async || status(0).await == Status::Signed).await;
    });
}
