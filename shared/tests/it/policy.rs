//! The claim picks what `policy::pick` picks: production runs the claim, and the simulation that the policy was chosen by runs `pick`.

use std::collections::BTreeSet;
use std::time::Duration;

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use shared::policy::{Due, Slot, pick};
use sqlx::{Connection, PgConnection, Row};

use crate::fixture::Fixture;

const WINDOW: i32 = 60;
/// How many seconds a job has been due or a slot free; negative until it is. The values are around five windows, which make a retry
/// overdue, but never so close to a threshold that the time between filling the tables and the claim matters. Some occur twice, so that ids
/// decide.
const DUE_FOR: [i32; 10] = [-90, 30, 31, 100, 100, 270, 330, 330, 331, 900];
const FREE_FOR: [i32; 6] = [-90, 30, 30, 31, 50, 900];

/// A state of the queue and the slots.
#[derive(Debug)]
struct State {
    /// How long each job has been due, and whether it is a retry.
    jobs: Vec<(i32, bool)>,
    /// How long each slot has been free, and how often it was used.
    slots: Vec<(i32, i64)>,
    most: usize,
    /// Whether the breaker is open and a probe is due.
    probing: bool,
}

impl State {
    fn random(rng: &mut SmallRng) -> Self {
        let choose = |from: &[i32], rng: &mut SmallRng| *from.choose(rng).unwrap();
        let retries = rng.random_range(0.0..=1.0);
        Self {
            jobs: (0..rng.random_range(0..40)).map(|_| (choose(&DUE_FOR, rng), rng.random_bool(retries))).collect(),
            slots: (0..rng.random_range(1..=14)).map(|_| (choose(&FREE_FOR, rng), rng.random_range(0..20))).collect(),
            most: rng.random_range(1..=15),
            probing: rng.random_bool(0.1),
        }
    }

    /// Makes the tables hold this state and nothing else, and returns the ids of the jobs, in order.
    async fn store(&self, connection: &mut PgConnection) -> Vec<i64> {
        let (due, retry): (Vec<i32>, Vec<bool>) = self.jobs.iter().copied().unzip();
        let (free, uses): (Vec<i32>, Vec<i64>) = self.slots.iter().copied().unzip();
        let bodies: Vec<Vec<u8>> = (0..due.len()).map(|n| vec![u8::try_from(n).unwrap(); 32]).collect();
        // One transaction, so that `now()` is the same for all.
        let mut transaction = connection.begin().await.unwrap();
        sqlx::raw_sql("delete from attempts; delete from jobs; delete from messages; delete from upstream_slots; delete from upstream")
            .execute(&mut *transaction)
            .await
            .unwrap();
        sqlx::query(
            "insert into upstream (calls, window_length, probe_at, breaker_failures, breaker_reason, breaker_at, timeline)
            select 10, make_interval(secs => $1), case when $2 then now() - interval '30 s' end, $2::int,
                case when $2 then 'test' end, case when $2 then now() end, substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)",
        )
        .bind(WINDOW)
        .bind(self.probing)
        .execute(&mut *transaction)
        .await
        .unwrap();
        sqlx::query(
            "insert into upstream_slots (slot, free_at, uses, window_length)
            select ord, now() - make_interval(secs => free), uses, make_interval(secs => $3) from unnest($1::int[], $2::bigint[]) with ordinality as s (free, uses, ord)",
        )
        .bind(&free)
        .bind(&uses)
        .bind(WINDOW)
        .execute(&mut *transaction)
        .await
        .unwrap();
        sqlx::query("insert into messages (id, digest, body) overriding system value select ord, message_digest(body), body from unnest($1::bytea[]) with ordinality as m (body, ord)")
            .bind(&bodies)
            .execute(&mut *transaction)
            .await
            .unwrap();
        let ids = sqlx::query(
            "insert into jobs (kind, message_id, next_run_at, attempt, lane)
            select 'sign', ord, now() - make_interval(secs => due), retry::int, retry::int
            from unnest($1::int[], $2::bool[]) with ordinality as j (due, retry, ord) order by ord
            returning id",
        )
        .bind(&due)
        .bind(&retry)
        .fetch_all(&mut *transaction)
        .await
        .unwrap();
        transaction.commit().await.unwrap();
        ids.into_iter().map(|row| row.get(0)).collect()
    }

    /// What the policy picks.
    fn picked(&self, ids: &[i64]) -> BTreeSet<(i64, i32)> {
        let now = Duration::from_secs(10_000);
        let ago = |seconds: i32| Duration::from_secs(u64::try_from(10_000 - seconds).unwrap());
        let lane = |retries: bool| {
            let jobs = ids.iter().zip(&self.jobs).filter(|(_, (due, retry))| *retry == retries && *due >= 0);
            let mut due: Vec<Due> = jobs.map(|(job, (due, _))| Due { at: ago(*due), job: *job }).collect();
            due.sort_unstable();
            due
        };
        let slots = (1..).zip(&self.slots).filter(|(_, (free, _))| *free >= 0);
        let slots: Vec<Slot> =
            slots.map(|(number, (free, uses))| Slot { number, free_at: ago(*free), uses: uses.unsigned_abs() }).collect();
        // A probe is the newest of the first tries.
        let (most, first) = if self.probing { (1, lane(false).pop().into_iter().collect()) } else { (self.most, lane(false)) };
        let window = Duration::from_secs(WINDOW.unsigned_abs().into());
        pick(now, window, most, &first, &lane(true), &slots).into_iter().map(|(job, slot)| (job, i32::try_from(slot).unwrap())).collect()
    }
}

#[tokio::test]
async fn the_claim_takes_the_jobs_and_the_slots_that_the_policy_picks() {
    let f = Fixture::new().await;
    let mut connection = f.connection().await;
    let mut rng = SmallRng::seed_from_u64(20_261_124);
    let (mut claimed_some, mut preferred_a_retry) = (0, 0);
    for round in 0..400 {
        let state = State::random(&mut rng);
        let ids = state.store(&mut connection).await;
        f.claim(state.most).await;
        let taken = sqlx::query("select j.id, s.slot from jobs j join upstream_slots s using (lease_token)").fetch_all(&mut connection);
        let taken: BTreeSet<(i64, i32)> = taken.await.unwrap().into_iter().map(|row| (row.get(0), row.get(1))).collect();
        assert_eq!(taken, state.picked(&ids), "round {round}: {state:?}, jobs {ids:?}");
        // How many rounds met what the test is about.
        let is_taken = |id: &i64| taken.iter().any(|(job, _)| job == id);
        claimed_some += u32::from(!taken.is_empty());
        let waits = |retry: bool, taken: bool| {
            let mut jobs = ids.iter().zip(&state.jobs);
            jobs.any(|(id, (due, retried))| *due >= 0 && *retried == retry && is_taken(id) == taken)
        };
        preferred_a_retry += u32::from(waits(true, true) && waits(false, false));
    }
    assert!(claimed_some > 200 && preferred_a_retry > 20, "{claimed_some} {preferred_a_retry}");
}
