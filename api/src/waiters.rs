//! Which callers wait for which message. A waiter registers before its request is stored, so that it cannot miss a result.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use shared::message::MessageDigest;
use tokio::sync::Notify;

/// The callers that wait in this process. Clones share the register.
#[derive(Clone, Debug, Default)]
pub struct Waiters {
    register: Arc<Mutex<HashMap<u64, Entry>>>,
    waiting: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Entry {
    bell: Arc<Notify>,
    waiting: usize,
}

impl Waiters {
    /// Registers a waiter for the message, until the returned value is dropped.
    #[must_use]
    pub fn register(&self, digest: MessageDigest) -> Waiter {
        let hint = digest.hint();
        let mut register = self.register.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = register.entry(hint).or_insert_with(|| Entry { bell: Arc::default(), waiting: 0 });
        entry.waiting += 1;
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut rung = Box::pin(Arc::clone(&entry.bell).notified_owned());
        rung.as_mut().enable();
        Waiter { hint, bell: Arc::clone(&entry.bell), rung, waiters: self.clone() }
    }

    /// Wakes the waiters for these messages.
    pub fn wake(&self, hints: &[u64]) {
        let register = self.register.lock().unwrap_or_else(PoisonError::into_inner);
        hints.iter().filter_map(|hint| register.get(hint)).for_each(|entry| entry.bell.notify_waiters());
    }

    /// Wakes all waiters: notifications may have been lost.
    pub fn wake_all(&self) {
        let register = self.register.lock().unwrap_or_else(PoisonError::into_inner);
        register.values().for_each(|entry| entry.bell.notify_waiters());
    }

    /// The number of waiting callers.
    #[must_use]
    pub fn count(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }
}

/// One registered waiter.
#[derive(Debug)]
pub struct Waiter {
    hint: u64,
    bell: Arc<Notify>,
    rung: std::pin::Pin<Box<tokio::sync::futures::OwnedNotified>>,
    waiters: Waiters,
}

impl Waiter {
    /// Waits until there may be a result that is newer than the registration, or than the last return of this function.
    pub async fn woken(&mut self) {
        self.rung.as_mut().await;
        self.rung.set(Arc::clone(&self.bell).notified_owned());
        self.rung.as_mut().enable();
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        self.waiters.waiting.fetch_sub(1, Ordering::Relaxed);
        let mut register = self.waiters.register.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = register.get_mut(&self.hint) {
            entry.waiting -= 1;
            if entry.waiting == 0 {
                register.remove(&self.hint);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use shared::message::Message;

    use super::*;

    #[test]
    fn a_result_between_the_registration_and_the_wait_is_not_lost() {
        let waiters = Waiters::default();
        let digest = Message::new("a".to_owned()).digest();
        let mut waiter = waiters.register(digest);
        waiters.wake(&[digest.hint()]);
        assert!(waiter.woken().now_or_never().is_some());
        assert!(waiter.woken().now_or_never().is_none());
        waiters.wake_all();
        assert!(waiter.woken().now_or_never().is_some());
    }

    #[test]
    fn all_who_wait_for_a_message_are_woken_and_nobody_else() {
        let waiters = Waiters::default();
        let (a, b) = (Message::new("a".to_owned()).digest(), Message::new("b".to_owned()).digest());
        let (mut one, mut two, mut other) = (waiters.register(a), waiters.register(a), waiters.register(b));
        waiters.wake(&[a.hint()]);
        assert!(one.woken().now_or_never().is_some() && two.woken().now_or_never().is_some());
        assert!(other.woken().now_or_never().is_none());
    }

    #[test]
    fn who_stops_waiting_leaves_nothing_behind() {
        let waiters = Waiters::default();
        let digest = Message::new("a".to_owned()).digest();
        let (one, two) = (waiters.register(digest), waiters.register(digest));
        drop(one);
        assert_eq!(waiters.count(), 1);
        drop(two);
        assert_eq!(waiters.count(), 0);
        assert!(waiters.register.lock().unwrap().is_empty());
    }
}
