//! Group commit: work that arrives while a batch is under way goes together into the next one.
//!
//! Nothing waits when there is nothing to wait for: an idle batcher runs a single item at once. Under load the batch grows to what
//! arrived during the last commit, so the cost of a commit is shared. A batch costs the same whatever is in it, and only then a little for
//! each item, so two things keep batches from becoming small:
//!
//! - One is under way at a time. While Postgres works on it, those who were in the one before come with their next items. Another one begins
//!   beside it if it is full, or if the one that is under way takes long: whoever holds up one batch must not hold up the others.
//! - Few items wait a moment for those who were just answered, if those mostly come back at once.

use std::future::Future;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex, Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

/// Why an item was not done.
#[derive(Debug, thiserror::Error)]
pub enum BatchError<E> {
    /// The queue in front of the batch is full.
    #[error("too much work is waiting")]
    Full,
    /// The batcher is gone; the process is stopping.
    #[error("stopping")]
    Stopped,
    /// The whole batch failed.
    #[error(transparent)]
    Failed(Arc<E>),
}

/// A batch that is under way for longer has no other one wait for it.
const LONG: Duration = Duration::from_millis(5);

/// So many items are worth a batch. Fewer wait for those who were in the last one, if those were several: no longer than that one took, and no
/// longer than this. If they did not come, so many further batches wait for nobody.
const WORTH_A_BATCH: usize = 16;
const SEVERAL: usize = 4;
const BACK_WITHIN: Duration = Duration::from_millis(3);
const IN_VAIN: u32 = 16;

/// How the items of a [`Batcher`] become batches.
#[derive(Clone, Copy, Debug)]
pub struct Batches {
    /// Most items in one.
    pub largest: usize,
    /// Most items that queue in front of them.
    pub waiting: usize,
    /// Most that are under way at the same time.
    pub at_once: usize,
    /// What those do who submitted an item, once they have their result.
    pub callers: Callers,
}

/// What callers do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Callers {
    /// They may come with another item at once, and a few items may wait for them.
    ComeBack,
    /// Nobody waits for them.
    Leave,
}

/// The batches that are under way, and the last one that ended.
#[derive(Default)]
struct UnderWay {
    one_ended: Notify,
    state: std::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    /// When those that are under way began.
    began: Vec<Instant>,
    last: Option<Ended>,
    /// Batches that will wait for nobody.
    in_vain: u32,
}

/// A batch that is under way, until it is dropped.
struct Batch<'a> {
    all: &'a UnderWay,
    items: usize,
    began: Instant,
}

/// A batch that ended.
#[derive(Clone, Copy)]
struct Ended {
    items: usize,
    took: Duration,
    at: Instant,
}

impl UnderWay {
    fn begin(&self, items: usize) -> Batch<'_> {
        let began = Instant::now();
        self.state().began.push(began);
        Batch { all: self, items, began }
    }

    /// When all that are under way have been so for long; nothing: none is.
    fn are_long_at(&self) -> Option<Instant> {
        self.state().began.iter().max().map(|began| *began + LONG)
    }

    /// For a batch that is about to begin: how many may be expected soon, because they were just answered, and until when; nothing while another
    /// is under way, or if this is one of those that wait for nobody.
    fn coming_back(&self) -> Option<(usize, Instant)> {
        let mut state = self.state();
        let last = state.last.filter(|last| last.items >= SEVERAL && state.began.is_empty())?;
        let until = last.at + last.took.min(BACK_WITHIN);
        if until <= Instant::now() {
            return None;
        }
        let waits = state.in_vain == 0;
        state.in_vain = state.in_vain.saturating_sub(1);
        waits.then_some((last.items, until))
    }

    fn did_not_come_back(&self) {
        self.state().in_vain = IN_VAIN;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let mut state = self.all.state();
        state.last = Some(Ended { items: self.items, took: self.began.elapsed(), at: Instant::now() });
        if let Some(place) = state.began.iter().position(|began| *began == self.began) {
            state.began.swap_remove(place);
        }
        drop(state);
        self.all.one_ended.notify_waiters();
    }
}

type Ticket<I, O, E> = (I, oneshot::Sender<Result<O, BatchError<E>>>);

/// A queue in front of a function that does many items at once. Clones share the queue.
pub struct Batcher<I, O, E> {
    queue: mpsc::Sender<Ticket<I, O, E>>,
}

impl<I, O, E> Clone for Batcher<I, O, E> {
    fn clone(&self) -> Self {
        Self { queue: self.queue.clone() }
    }
}

impl<I, O, E> Batcher<I, O, E>
where
    I: Send + 'static,
    O: Send + 'static,
    E: Send + Sync + 'static,
{
    /// Starts the tasks that call `run` with `batches` of what is submitted; they end when the last clone is dropped. `run` returns one result
    /// per item, in order.
    pub fn spawn<F, Fut>(batches: Batches, run: F) -> Self
    where
        F: Fn(Vec<I>) -> Fut + Clone + Send + Sync + 'static,
        Fut: Future<Output = Result<Vec<O>, E>> + Send + 'static,
    {
        let (queue, arrivals) = mpsc::channel::<Ticket<I, O, E>>(batches.waiting);
        let (arrivals, under_way) = (Arc::new(Mutex::new(arrivals)), Arc::<UnderWay>::default());
        for _ in 0..batches.at_once {
            tokio::spawn(Self::work(Arc::clone(&arrivals), Arc::clone(&under_way), batches, run.clone()));
        }
        Self { queue }
    }

    async fn work<F, Fut>(arrivals: Arc<Mutex<mpsc::Receiver<Ticket<I, O, E>>>>, under_way: Arc<UnderWay>, batches: Batches, run: F)
    where
        F: Fn(Vec<I>) -> Fut,
        Fut: Future<Output = Result<Vec<O>, E>>,
    {
        let mut tickets = Vec::with_capacity(batches.largest);
        // Whoever holds the lock waits for arrivals, and takes all that are there; the others are at work, or next.
        while Self::gather(&mut *arrivals.lock().await, &mut tickets, batches, &under_way).await {
            // A caller that has given up is answered already: its item must not be done behind its back.
            let (items, answers): (Vec<I>, Vec<_>) = tickets.drain(..).filter(|(_, answer)| !answer.is_closed()).unzip();
            if items.is_empty() {
                continue;
            }
            let batch = under_way.begin(items.len());
            let ran = run(items).await;
            drop(batch);
            match ran {
                Ok(results) => {
                    for (answer, result) in answers.into_iter().zip(results) {
                        let _ = answer.send(Ok(result));
                    }
                }
                Err(error) => {
                    let error = Arc::new(error);
                    for answer in answers {
                        let _ = answer.send(Err(BatchError::Failed(Arc::clone(&error))));
                    }
                }
            }
        }
    }

    /// Takes what is there, once something is; false: nothing will come any more.
    async fn gather(
        arrivals: &mut mpsc::Receiver<Ticket<I, O, E>>,
        tickets: &mut Vec<Ticket<I, O, E>>,
        batches: Batches,
        under_way: &UnderWay,
    ) -> bool {
        let largest = batches.largest;
        if arrivals.recv_many(tickets, largest).await == 0 {
            return false;
        }
        // Whoever was about to submit at this moment does it now, in the same batch; this takes no time where nobody was.
        let mut before = 0;
        while tickets.len() > before && tickets.len() < largest {
            before = tickets.len();
            tokio::task::yield_now().await;
            take_what_is_there(arrivals, tickets, largest);
        }
        let one_ends = under_way.one_ended.notified();
        tokio::pin!(one_ends);
        one_ends.as_mut().enable();
        if let Some(long) = under_way.are_long_at() {
            tokio::select! {
                () = fill(arrivals, tickets, largest) => {}
                () = one_ends => {}
                () = sleep_until(long) => {}
            }
        }
        take_what_is_there(arrivals, tickets, largest);
        if batches.callers == Callers::ComeBack
            && tickets.len() < WORTH_A_BATCH.min(largest)
            && let Some((coming, until)) = under_way.coming_back()
        {
            let enough = (tickets.len() + coming).min(WORTH_A_BATCH).min(largest);
            tokio::select! {
                () = fill(arrivals, tickets, enough) => {}
                () = sleep_until(until) => under_way.did_not_come_back(),
            }
            take_what_is_there(arrivals, tickets, largest);
        }
        true
    }

    /// Queues one item and waits for its result. An item whose caller stops waiting before its batch begins is not done.
    ///
    /// # Errors
    /// [`BatchError::Full`] at once when too many items wait; [`BatchError::Failed`] when its batch failed as a whole.
    pub async fn submit(&self, item: I) -> Result<O, BatchError<E>> {
        let (answer, result) = oneshot::channel();
        self.queue.try_send((item, answer)).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => BatchError::Full,
            mpsc::error::TrySendError::Closed(_) => BatchError::Stopped,
        })?;
        result.await.unwrap_or(Err(BatchError::Stopped))
    }
}

/// Waits until there are `enough`, or nothing comes any more. What was taken is kept if nobody waits for it to the end.
async fn fill<T>(arrivals: &mut mpsc::Receiver<T>, tickets: &mut Vec<T>, enough: usize) {
    while tickets.len() < enough && arrivals.recv_many(tickets, enough - tickets.len()).await > 0 {}
}

fn take_what_is_there<T>(arrivals: &mut mpsc::Receiver<T>, tickets: &mut Vec<T>, largest: usize) {
    while tickets.len() < largest
        && let Ok(ticket) = arrivals.try_recv()
    {
        tickets.push(ticket);
    }
}

#[cfg(test)]
mod tests;
