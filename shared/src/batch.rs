//! Group commit: items that arrive while a batch is running go together into the next one.
//!
//! An idle batcher runs a single item at once, without waiting. Under load, a batch grows to the items that arrived during the last commit,
//! so they share the cost of a commit. A batch has a fixed cost, and each item adds only a little, so these rules keep batches from becoming
//! small:
//!
//! - One batch runs at a time. While Postgres works on it, the callers of the previous batch submit their next items. Another batch starts
//!   beside it only if the new one is full, or if the running one takes long: a batch that is held up must not hold up the others.
//! - A batch is not yet worthwhile with a few items only. It takes those of all tasks that are ready to run. If callers mostly come back at
//!   once, it also waits a moment for those that were just answered: several processes that share one Postgres have few callers each, and
//!   would otherwise all store small batches.
//!
//! A batch that is worthwhile waits for nobody, because whoever processes batches has nothing to do meanwhile.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Mutex, Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

/// Why an item was not processed.
#[derive(Debug, thiserror::Error)]
pub enum BatchError<E> {
    /// The queue in front of the batch is full.
    #[error("too much work is waiting")]
    Full,
    /// The batcher is gone: the process is stopping.
    #[error("stopping")]
    Stopped,
    /// The batch panicked, which is a bug.
    #[error("a bug; the log has it")]
    Panicked,
    /// The whole batch failed.
    #[error(transparent)]
    Failed(Arc<E>),
}

/// A batch that has been running for longer than this no longer makes the next one wait.
const LONG: Duration = Duration::from_millis(5);

/// A batch waits for the callers of the last one only if there were at least this many.
const SEVERAL: usize = 4;

/// The longest wait for the callers of the last batch; it is also no longer than that batch took.
const BACK_WITHIN: Duration = Duration::from_millis(3);

/// How many batches do not wait after one has waited in vain.
const IN_VAIN: u32 = 16;

/// How a [`Batcher`] forms batches.
#[derive(Clone, Copy, Debug)]
pub struct Batches {
    /// Maximum number of items in a batch.
    pub largest: usize,
    /// A batch of this many items waits for no others. At most `largest`.
    pub worthwhile: usize,
    /// Maximum number of items that wait for a batch.
    pub waiting: usize,
    /// Maximum number of batches that run at the same time.
    pub at_once: usize,
    /// What the callers do once they have their result.
    pub callers: Callers,
}

/// What callers do once they have their result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Callers {
    /// They may submit another item at once, so a small batch may wait for them.
    ComeBack,
    /// No batch waits for them.
    Leave,
}

/// The running batches, and the last one that ended.
#[derive(Default)]
struct UnderWay {
    one_ended: Notify,
    state: std::sync::Mutex<State>,
}

#[derive(Default)]
struct State {
    /// When each running batch began.
    began: Vec<Instant>,
    last: Option<Ended>,
    /// How many of the next batches do not wait for callers.
    in_vain: u32,
}

/// A running batch. It ends when it is dropped.
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

    /// When all running batches will have been running for `LONG`. `None` if none is running.
    fn are_long_at(&self) -> Option<Instant> {
        self.state().began.iter().max().map(|began| *began + LONG)
    }

    /// For a batch that is about to start: how many items to expect soon from the callers that were just answered, and until when. `None`
    /// if none are expected, while another batch is running, or if this is one of the batches that do not wait.
    fn take_expected(&self) -> Option<(usize, Instant)> {
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

    fn waited_in_vain(&self) {
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
        if let Some(index) = state.began.iter().position(|began| *began == self.began) {
            state.began.swap_remove(index);
        }
        drop(state);
        self.all.one_ended.notify_waiters();
    }
}

type Ticket<I, O, E> = (I, oneshot::Sender<Result<O, BatchError<E>>>);

/// A queue in front of a function that processes many items at once. Clones share the queue.
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
    /// Starts the tasks that call `run` with batches of the submitted items.
    ///
    /// `run` returns one result per item, in order. The tasks end when the last clone is dropped.
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
        // The task that holds the lock waits for arrivals and takes all of them. The other tasks are running a batch, or take the lock
        // next.
        while Self::gather(&mut *arrivals.lock().await, &mut tickets, batches, &under_way).await {
            // A caller that has given up treats its item as not processed, so the item must not run behind its back.
            let (items, answers): (Vec<I>, Vec<_>) = tickets.drain(..).filter(|(_, answer)| !answer.is_closed()).unzip();
            if items.is_empty() {
                continue;
            }
            let batch = under_way.begin(items.len());
            // A panic is a bug, and the panic hook reports it. The batches to come must not be without a task because of it.
            let ran = AssertUnwindSafe(run(items)).catch_unwind().await;
            drop(batch);
            match ran {
                Err(_) => {
                    for answer in answers {
                        let _ = answer.send(Err(BatchError::Panicked));
                    }
                }
                Ok(Ok(results)) => {
                    for (answer, result) in answers.into_iter().zip(results) {
                        let _ = answer.send(Ok(result));
                    }
                }
                Ok(Err(error)) => {
                    let error = Arc::new(error);
                    for answer in answers {
                        let _ = answer.send(Err(BatchError::Failed(Arc::clone(&error))));
                    }
                }
            }
        }
    }

    /// Waits for an item, then takes all that have arrived. Returns false if no more will arrive.
    async fn gather(
        arrivals: &mut mpsc::Receiver<Ticket<I, O, E>>,
        tickets: &mut Vec<Ticket<I, O, E>>,
        batches: Batches,
        under_way: &UnderWay,
    ) -> bool {
        let Batches { largest, worthwhile, .. } = batches;
        if arrivals.recv_many(tickets, largest).await == 0 {
            return false;
        }
        // Callers that are about to submit do so now, in the same batch. This takes no time if there are none.
        let mut before = 0;
        while tickets.len() > before && tickets.len() < worthwhile {
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
            && tickets.len() < worthwhile
            && let Some((coming, until)) = under_way.take_expected()
        {
            let enough = (tickets.len() + coming).min(worthwhile);
            tokio::select! {
                () = fill(arrivals, tickets, enough) => {}
                () = sleep_until(until) => under_way.waited_in_vain(),
            }
            take_what_is_there(arrivals, tickets, largest);
        }
        true
    }

    /// Queues one item and waits for its result. If the caller stops waiting before the batch starts, the item is not processed.
    ///
    /// # Errors
    /// [`BatchError::Full`] at once if too many items wait; [`BatchError::Failed`] if the whole batch failed.
    pub async fn submit(&self, item: I) -> Result<O, BatchError<E>> {
        let (answer, result) = oneshot::channel();
        self.queue.try_send((item, answer)).map_err(|refused| match refused {
            mpsc::error::TrySendError::Full(_) => BatchError::Full,
            mpsc::error::TrySendError::Closed(_) => BatchError::Stopped,
        })?;
        result.await.unwrap_or(Err(BatchError::Stopped))
    }
}

/// Waits until there are `enough` items, or no more will arrive. Cancel-safe: the items taken so far are kept.
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
