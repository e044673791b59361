//! Group commit: items that arrive while a batch is running go together into the next one.
//!
//! An idle batcher runs a single item at once, without waiting. Under load, a batch grows to the items that arrived during the last commit,
//! so they share the cost of a commit. A batch has a fixed cost, and each item adds only a little. So one batch runs at a time: while Postgres
//! works on it, the callers of the previous batch submit their next items. Another batch starts beside it only if the new one is full, or if
//! the running one takes long: a batch that is held up must not hold up the others.

use std::future::Future;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

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
    /// The whole batch failed.
    #[error(transparent)]
    Failed(Arc<E>),
}

/// A batch that has been running for longer than this no longer makes the next one wait.
const LONG: Duration = Duration::from_millis(5);

/// How a [`Batcher`] forms batches.
#[derive(Clone, Copy, Debug)]
pub struct Batches {
    /// Maximum number of items in a batch.
    pub largest: usize,
    /// Maximum number of items that wait for a batch.
    pub waiting: usize,
    /// Maximum number of batches that run at the same time.
    pub at_once: usize,
}

/// The running batches.
#[derive(Default)]
struct UnderWay {
    one_ended: Notify,
    /// When each of them began.
    began: std::sync::Mutex<Vec<Instant>>,
}

/// A running batch. It ends when it is dropped.
struct Batch<'a> {
    all: &'a UnderWay,
    began: Instant,
}

impl UnderWay {
    fn begin(&self) -> Batch<'_> {
        let began = Instant::now();
        self.began().push(began);
        Batch { all: self, began }
    }

    /// When all running batches will have been running for `LONG`. `None` if none is running.
    fn are_long_at(&self) -> Option<Instant> {
        self.began().iter().max().map(|began| *began + LONG)
    }

    fn began(&self) -> MutexGuard<'_, Vec<Instant>> {
        self.began.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let mut all = self.all.began();
        if let Some(index) = all.iter().position(|began| *began == self.began) {
            all.swap_remove(index);
        }
        drop(all);
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
        while Self::gather(&mut *arrivals.lock().await, &mut tickets, batches.largest, &under_way).await {
            // A caller that has given up treats its item as not processed, so the item must not run behind its back.
            let (items, answers): (Vec<I>, Vec<_>) = tickets.drain(..).filter(|(_, answer)| !answer.is_closed()).unzip();
            if items.is_empty() {
                continue;
            }
            let batch = under_way.begin();
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

    /// Waits for an item, then takes all that have arrived. Returns false if no more will arrive.
    async fn gather(
        arrivals: &mut mpsc::Receiver<Ticket<I, O, E>>,
        tickets: &mut Vec<Ticket<I, O, E>>,
        largest: usize,
        under_way: &UnderWay,
    ) -> bool {
        if arrivals.recv_many(tickets, largest).await == 0 {
            return false;
        }
        // Callers that are about to submit do so now, in the same batch. This takes no time if there are none.
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
