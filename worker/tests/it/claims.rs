//! Claims that skip leased and finished jobs, and jobs that appear behind the low-water mark.

use std::sync::Arc;
use std::time::Duration;

use devkit::upstream::SimulatorOptions;
use shared::store::low_water::Marks;
use shared::store::sign_finish::{Call, SignEnding, SignFinish, UpstreamNews};
use shared::store::upstream::WorkerId;
use shared::units::Rate;
use worker::sign::claims::Claims;

use crate::world::World;

const LEASE: Duration = Duration::from_mins(1);

fn marks(world: &World) -> Marks {
    Marks::new(world.store.clone(), Arc::default())
}

fn claims(world: &World, rate: Rate) -> Claims {
    Claims::new(world.store.clone(), marks(world), rate, LEASE)
}

#[tokio::test]
async fn a_job_that_is_given_back_behind_the_low_water_mark_is_claimed_again() {
    let world = World::new(SimulatorOptions::default(), "10/60s").await;
    is_claimed_again(&world, marks(&world)).await;
}

#[tokio::test]
async fn a_job_that_is_given_back_behind_the_low_water_mark_is_claimed_again_though_looking_at_all_takes_long() {
    let world = World::new(SimulatorOptions::default(), "10/60s").await;
    is_claimed_again(&world, marks(&world).quick_within(Duration::ZERO)).await;
}

async fn is_claimed_again(world: &World, marks: Marks) {
    let rate = "10/60s".parse().unwrap();
    world.store.join_workers(WorkerId::generate(), rate).await.unwrap();
    let claims = Claims::new(world.store.clone(), marks, rate, LEASE);
    let mut given_back = None;
    for n in 0..3 {
        world.post([format!("m{n}")]).await;
        // Further apart than an insert is late to commit.
        tokio::time::sleep(Duration::from_millis(150)).await;
        let job = claims.claim(1).await.unwrap().jobs.remove(0);
        assert_eq!(job.message.text(), format!("m{n}"));
        given_back.get_or_insert(job);
    }
    let job = given_back.unwrap();
    let finish = SignFinish {
        digest: job.message.digest(),
        lease: job.lease,
        ending: SignEnding::Released,
        call: Call::NotMade,
        status: None,
        error: None,
        upstream: UpstreamNews::None,
    };
    world.store.finish_sign_jobs(&[finish]).await.unwrap();
    let again = loop {
        let mut claimed = claims.claim(10).await.unwrap();
        if let Some(job) = claimed.jobs.pop() {
            break job;
        }
        // `None` while a full scan is under way.
        let next = claimed.again_in().unwrap_or(Duration::from_millis(10));
        assert!(next < Duration::from_secs(5), "{next:?}");
        tokio::time::sleep(next).await;
    };
    assert_eq!(again.message.text(), "m0");
}

#[tokio::test]
async fn two_processes_that_claim_from_their_own_marks_leave_nothing_behind() {
    let world = World::new(SimulatorOptions::default(), "1000/60s").await;
    let rate = "1000/60s".parse().unwrap();
    world.store.join_workers(WorkerId::generate(), rate).await.unwrap();
    let claims: Vec<Claims> = (0..2).map(|_| claims(&world, rate)).collect();
    let claim = async |claims: &Claims| {
        let mut claimed = Vec::new();
        let mut quiet = 0;
        // Two empty claims: one from the mark on, and one full scan.
        while quiet < 2 {
            let found = claims.claim(7).await.unwrap();
            let again_in = found.again_in();
            quiet = if found.jobs.is_empty() { quiet + 1 } else { 0 };
            claimed.extend(found.jobs.into_iter().map(|job| job.message.text().to_owned()));
            if quiet > 0 {
                tokio::time::sleep(again_in.unwrap_or_default()).await;
            }
        }
        claimed
    };
    let post = async {
        for chunk in 0..20 {
            world.post((0..10).map(|n| format!("{chunk} {n}"))).await;
        }
    };
    let ((), one, other) = tokio::join!(post, claim(&claims[0]), claim(&claims[1]));
    let mut rest = claim(&claims[0]).await;
    rest.extend(one);
    rest.extend(other);
    rest.sort_unstable();
    let found = rest.len();
    rest.dedup();
    assert_eq!((found, rest.len()), (200, 200));
}
