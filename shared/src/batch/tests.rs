//! Tests with batches that end when a gate allows it, mostly in paused time.

use std::sync::Mutex as Lock;

use tokio::sync::Semaphore;

use super::*;

type Seen = Arc<Lock<Vec<Vec<u32>>>>;

/// A batch with this item never ends.
const HELD_UP: u32 = 1313;

/// A batch with this item panics.
const PANICS: u32 = 666;

/// How many items make a batch worthwhile.
const WORTHWHILE: usize = 16;

/// A batcher that doubles its items, records its batches, and ends each one only when the gate gives it a permit.
fn doubler(largest: usize, waiting: usize) -> (Batcher<u32, u32, String>, Arc<Semaphore>, Seen) {
    doublers(Batches { largest, worthwhile: WORTHWHILE.min(largest), waiting, at_once: 1, callers: Callers::ComeBack })
}

fn doublers(batches: Batches) -> (Batcher<u32, u32, String>, Arc<Semaphore>, Seen) {
    let (gate, seen) = (Arc::new(Semaphore::new(0)), Seen::default());
    let (g, s) = (Arc::clone(&gate), Arc::clone(&seen));
    let batcher = Batcher::spawn(batches, move |items: Vec<u32>| {
        let (g, s) = (Arc::clone(&g), Arc::clone(&s));
        async move {
            s.lock().unwrap().push(items.clone());
            if items.contains(&HELD_UP) {
                std::future::pending::<()>().await;
            }
            g.acquire().await.unwrap().forget();
            assert!(!items.contains(&PANICS), "as a bug would");
            if items.contains(&13) { Err("unlucky".to_owned()) } else { Ok(items.iter().map(|n| n * 2).collect()) }
        }
    });
    (batcher, gate, seen)
}

async fn until(condition: impl Fn() -> bool) {
    while !condition() {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn items_that_arrive_during_a_batch_go_together_in_the_next() {
    let (batcher, gate, seen) = doubler(10, 10);
    let first = tokio::spawn({
        let b = batcher.clone();
        async move { b.submit(1).await }
    });
    until(|| seen.lock().unwrap().len() == 1).await;
    let (mut two, mut three) = (Box::pin(batcher.submit(2)), Box::pin(batcher.submit(3)));
    assert!(futures_util::poll!(&mut two).is_pending() && futures_util::poll!(&mut three).is_pending());
    gate.add_permits(2);
    assert_eq!(first.await.unwrap().unwrap(), 2);
    assert_eq!((two.await.unwrap(), three.await.unwrap()), (4, 6));
    assert_eq!(*seen.lock().unwrap(), [vec![1], vec![2, 3]]);
}

/// Lets 200 callers submit, one after the other. Returns the sizes of their batches.
async fn sizes_of_a_chain(worthwhile: usize) -> Vec<usize> {
    const LAST: u32 = 200;
    /// Submits `n` from a new task. It spawns the task for the next item, which becomes ready only then.
    fn submit_from(batcher: &Batcher<u32, u32, String>, n: u32) {
        let batcher = batcher.clone();
        tokio::spawn(async move {
            let mut this = Box::pin(batcher.submit(n));
            let _ = futures_util::poll!(&mut this);
            if n < LAST {
                submit_from(&batcher, n + 1);
            }
            this.await
        });
    }
    let (batcher, gate, seen) = doublers(Batches { largest: 1000, worthwhile, waiting: 1000, at_once: 1, callers: Callers::Leave });
    gate.add_permits(1000);
    submit_from(&batcher, 1);
    until(|| seen.lock().unwrap().iter().map(Vec::len).sum::<usize>() == LAST as usize).await;
    seen.lock().unwrap().iter().map(Vec::len).collect()
}

#[tokio::test]
async fn whoever_is_about_to_submit_is_in_the_same_batch() {
    assert_eq!(sizes_of_a_chain(1000).await, [200]);
}

#[tokio::test]
async fn a_worthwhile_batch_does_not_wait_for_those_who_are_about_to_submit() {
    let first = sizes_of_a_chain(WORTHWHILE).await[0];
    assert!((WORTHWHILE..200).contains(&first), "{first} items");
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let (batcher, gate, seen) = doubler(1, 1);
    let first = tokio::spawn({
        let b = batcher.clone();
        async move { b.submit(1).await }
    });
    until(|| seen.lock().unwrap().len() == 1).await;
    let mut second = Box::pin(batcher.submit(2));
    assert!(futures_util::poll!(&mut second).is_pending());
    assert!(matches!(batcher.submit(3).await, Err(BatchError::Full)));
    gate.add_permits(2);
    assert_eq!((first.await.unwrap().unwrap(), second.await.unwrap()), (2, 4));
}

#[tokio::test]
async fn a_failed_batch_fails_all_of_its_items_and_no_other() {
    let (batcher, gate, _) = doubler(10, 10);
    gate.add_permits(2);
    assert!(matches!(batcher.submit(13).await, Err(BatchError::Failed(_))));
    assert_eq!(batcher.submit(4).await.unwrap(), 8);
}

#[tokio::test]
async fn a_batch_that_panics_fails_its_items_and_no_other() {
    let (batcher, gate, _) = doubler(10, 10);
    gate.add_permits(2);
    assert!(matches!(batcher.submit(PANICS).await, Err(BatchError::Panicked)));
    assert_eq!(batcher.submit(4).await.unwrap(), 8);
}

#[tokio::test]
async fn an_item_whose_caller_gave_up_is_not_done() {
    let (batcher, gate, seen) = doubler(1, 10);
    let first = tokio::spawn({
        let b = batcher.clone();
        async move { b.submit(1).await }
    });
    until(|| seen.lock().unwrap().len() == 1).await;
    let mut abandoned = Box::pin(batcher.submit(2));
    assert!(futures_util::poll!(&mut abandoned).is_pending());
    drop(abandoned);
    gate.add_permits(2);
    first.await.unwrap().unwrap();
    assert_eq!(batcher.submit(3).await.unwrap(), 6);
    assert_eq!(*seen.lock().unwrap(), [vec![1], vec![3]]);
}

/// Runs up to two batches of up to 20 items at a time. A batch of `first` items is running when `more` items are submitted.
async fn beside_one(first: u32, more: u32) -> Running {
    beside_one_of(Callers::ComeBack, first, more).await
}

async fn beside_one_of(callers: Callers, first: u32, more: u32) -> Running {
    let (batcher, gate, seen) = doublers(Batches { largest: 20, worthwhile: WORTHWHILE, waiting: 100, at_once: 2, callers });
    let batches = Running { batcher, gate, seen };
    batches.submit(0..first);
    batches.settle().await;
    batches.submit(first..first + more);
    batches.settle().await;
    batches
}

struct Running {
    batcher: Batcher<u32, u32, String>,
    gate: Arc<Semaphore>,
    seen: Seen,
}

impl Running {
    fn submit(&self, items: std::ops::Range<u32>) {
        for n in items {
            let batcher = self.batcher.clone();
            tokio::spawn(async move { batcher.submit(n).await });
        }
    }

    /// Lets everything happen that needs no time to pass.
    async fn settle(&self) {
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
    }

    /// Ends the running batch after `time`.
    async fn end_after(&self, time: Duration) {
        tokio::time::sleep(time).await;
        self.gate.add_permits(1);
        self.settle().await;
    }

    fn sizes(&self) -> Vec<usize> {
        self.seen.lock().unwrap().iter().map(Vec::len).collect()
    }
}

const SHORT: Duration = Duration::from_millis(2);

#[tokio::test(start_paused = true)]
async fn beside_a_batch_that_is_under_way_another_one_begins_when_it_is_full() {
    assert_eq!(beside_one(1, 20).await.sizes(), [1, 20]);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_not_full_begins_when_the_one_that_is_under_way_ends() {
    let batches = beside_one(1, 19).await;
    assert_eq!(batches.sizes(), [1]);
    batches.end_after(SHORT).await;
    assert_eq!(batches.sizes(), [1, 19]);
}

#[tokio::test(start_paused = true)]
async fn a_batch_that_is_held_up_holds_up_one_other_and_not_for_long() {
    let batches = beside_one(0, 0).await;
    batches.submit(HELD_UP..HELD_UP + 1);
    batches.settle().await;
    batches.submit(0..3);
    batches.settle().await;
    assert_eq!(batches.sizes(), [1]);
    batches.end_after(LONG).await;
    assert_eq!(batches.sizes(), [1, 3]);
    batches.submit(3..4);
    batches.settle().await;
    assert_eq!(batches.sizes(), [1, 3, 1]);
}

#[tokio::test(start_paused = true)]
async fn a_few_items_wait_for_those_who_were_just_answered() {
    let batches = beside_one(8, 2).await;
    batches.end_after(SHORT).await;
    assert_eq!(batches.sizes(), [8]);
    batches.submit(100..108);
    batches.settle().await;
    assert_eq!(batches.sizes(), [8, 10]);
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_longer_than_a_batch_takes_for_those_who_do_not_come_back() {
    let batches = beside_one(8, 2).await;
    batches.end_after(SHORT).await;
    assert_eq!(batches.sizes(), [8]);
    tokio::time::sleep(SHORT).await;
    batches.settle().await;
    assert_eq!(batches.sizes(), [8, 2]);
}

#[tokio::test(start_paused = true)]
async fn nobody_waits_for_those_who_leave() {
    let batches = beside_one_of(Callers::Leave, 8, 2).await;
    batches.end_after(SHORT).await;
    assert_eq!(batches.sizes(), [8, 2]);
}

#[tokio::test(start_paused = true)]
async fn many_items_wait_for_nobody() {
    let batches = beside_one(8, 16).await;
    batches.end_after(SHORT).await;
    assert_eq!(batches.sizes(), [8, 16]);
}

#[tokio::test(start_paused = true)]
async fn an_item_that_comes_later_waits_for_nobody() {
    let batches = beside_one(8, 0).await;
    batches.end_after(SHORT).await;
    tokio::time::sleep(SHORT).await;
    batches.submit(100..101);
    batches.settle().await;
    assert_eq!(batches.sizes(), [8, 1]);
}

#[tokio::test(start_paused = true)]
async fn an_item_waits_for_nobody_after_a_batch_of_few() {
    let batches = beside_one(3, 1).await;
    batches.end_after(SHORT).await;
    assert_eq!(batches.sizes(), [3, 1]);
}

#[tokio::test(start_paused = true)]
async fn after_a_batch_that_took_long_nobody_waits_as_long() {
    let batches = beside_one(8, 0).await;
    batches.end_after(10 * LONG).await;
    batches.submit(100..101);
    batches.settle().await;
    assert_eq!(batches.sizes(), [8]);
    tokio::time::sleep(BACK_WITHIN).await;
    batches.settle().await;
    assert_eq!(batches.sizes(), [8, 1]);
}

#[tokio::test(start_paused = true)]
async fn those_who_do_not_come_back_are_not_waited_for_again_soon() {
    let batches = beside_one(8, 8).await;
    batches.end_after(SHORT).await;
    tokio::time::sleep(SHORT).await;
    batches.settle().await;
    assert_eq!(batches.sizes(), [8, 8]);
    for n in 0..=IN_VAIN {
        assert_eq!(batches.sizes().len(), 2 + n as usize, "batch {n} waits for nobody");
        batches.submit(100..108);
        batches.end_after(SHORT).await;
    }
    assert_eq!(batches.sizes().len(), 2 + IN_VAIN as usize, "then it is tried again");
}
