//! The way around the receivers. A claim looks at a part of them, in the order of their ids, and the next one continues where it stopped.

use std::sync::{Mutex, PoisonError};

use shared::store::receivers::ReceiverId;

/// Where the last claim stopped: at this receiver, or at the end.
#[derive(Debug, Default)]
pub struct Cursor(Mutex<Option<ReceiverId>>);

impl Cursor {
    /// Where the next claim begins: after this receiver.
    #[must_use]
    pub fn get(&self) -> Option<ReceiverId> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers where a claim stopped.
    pub fn set(&self, receiver: Option<ReceiverId>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = receiver;
    }
}

/// The walks of one claim over the receivers: from where the last claim stopped to the end, and then from the beginning to there.
pub struct Circle {
    began_after: Option<ReceiverId>,
    /// Whether the end was reached, so that the walk is now in the part before `began_after`.
    wrapped: bool,
}

impl Circle {
    /// Begins after this receiver.
    #[must_use]
    pub fn after(after: Option<ReceiverId>) -> Self {
        Self { began_after: after, wrapped: after.is_none() }
    }

    /// Whether every receiver has been visited once a walk stopped here; `None` if it reached the last receiver.
    pub fn completes_at(&mut self, stopped_at: Option<ReceiverId>) -> bool {
        match stopped_at {
            None => std::mem::replace(&mut self.wrapped, true),
            Some(at) => self.wrapped && self.began_after.is_some_and(|began| at >= began),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> ReceiverId {
        ReceiverId(uuid::Uuid::from_u128(number))
    }

    /// The number of walks of 256 receivers that a claim makes if there are `receivers` in all, it begins after `began`, and it finds
    /// nothing.
    fn walks(receivers: u128, began: Option<u128>) -> u32 {
        let mut circle = Circle::after(began.map(id));
        let mut after = began.unwrap_or(0);
        for walks in 1..100 {
            let last = receivers.min(after + 256);
            let stopped_at = (last == after + 256).then(|| id(last));
            if circle.completes_at(stopped_at) {
                return walks;
            }
            after = if stopped_at.is_some() { last } else { 0 };
        }
        panic!("it goes on for ever");
    }

    #[test]
    fn a_claim_that_finds_nothing_goes_around_once_wherever_it_began() {
        assert_eq!([0, 1, 255, 256, 257, 1000].map(|receivers| walks(receivers, None)), [1, 1, 1, 2, 2, 4]);
        assert_eq!([0, 1, 255, 256, 257, 1000].map(|receivers| walks(receivers, Some(256))), [2, 2, 2, 2, 2, 4]);
        assert_eq!(walks(1000, Some(500)), 4);
    }
}
