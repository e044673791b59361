//! A batch of POSTs becomes requests, messages and jobs, durably: in one commit, or in two if a part of it is known already.
//!
//! | file | what |
//! |---|---|
//! | `request` | a POST, checked and ready to be stored |
//! | `columns` | a batch of them, as `unnest` takes it |
//! | `new` | one statement for messages that were never posted before, which is nearly all of them |
//! | `any` | a transaction for whatever may be known already: a message, an idempotency key |
//!
//! Two invariants must hold: a request that was acknowledged has a job that will end it, and a message that is signed is never sent for
//! signing again. Both are at risk at the moment when a job ends. So whoever attaches a request to a live job locks the job's row, and so
//! does whoever ends the job. The second of them sees what the first wrote, because a statement that began later reads it, or because the
//! job counts it (see `sign_finish`). Whoever opens a job, deletes one, or attaches a request to one that has signed locks the message's
//! row. An insert locks the message's row too, and no other transaction sees the message before the commit.

mod any;
mod columns;
mod new;
mod request;

use time::OffsetDateTime;
use uuid::Uuid;

use crate::forecast::Waiting;

pub use request::{NewRequest, WebhookTarget};

/// The outcome of one POST.
pub type Accepted = Result<Stored, Rejection>;

/// A POST that is stored, now or earlier under the same idempotency key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The request that answers the POST.
    pub id: Uuid,
    /// When that request was stored.
    pub created_at: OffsetDateTime,
    /// Whether its outcome is available already.
    pub settled: bool,
    /// How its message waits, if no other request waited for it before. Then there is nothing else to look up about the request.
    pub waiting: Option<Waiting>,
}

/// Why nothing was stored of a POST.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The idempotency key was used with another payload.
    Mismatch,
    /// The limit of unfinished requests, or of requests that wait for one message, is reached.
    Full,
    /// The message differs from one that is stored under the same digest. This does not happen by chance.
    Collision,
}
