//! A group of POSTs becomes requests, messages and jobs, durably: in one commit, or two where a part of it is known already.
//!
//! | file | what |
//! |---|---|
//! | `request` | a POST, checked and ready to be stored |
//! | `columns` | a group of them, as `unnest` takes it |
//! | `new` | one statement for messages that nobody has posted before: the way of nearly all |
//! | `any` | a transaction for whatever may be known already: a message, an idempotency key |
//!
//! Two facts must never part: a request that was answered has a job that will end it, and a message that is signed is never asked for
//! again. Both can be broken in the moment in which a job ends. So everybody who attaches a request to a live job holds the job's row,
//! and so does everybody who ends it: whoever comes second sees what the first one wrote, because it is read by a statement that began
//! later, or (see `sign_finish`) because it is counted in the job. And everybody who opens a job, deletes one, or attaches a request to one that
//! has signed, holds the message's row. Who inserts a message holds it, and nobody else knows it before the commit.

mod any;
mod columns;
mod new;
mod request;

use time::OffsetDateTime;
use uuid::Uuid;

use crate::forecast::Waiting;

pub use request::{NewRequest, WebhookTarget};

/// What became of one POST.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// It is stored, now or earlier under the same idempotency key.
    Stored {
        /// The request that answers it.
        id: Uuid,
        /// When that request was stored.
        created_at: OffsetDateTime,
        /// Whether its outcome is there already.
        settled: bool,
        /// How its message waits, if nobody has waited for it before: then nothing else is to be known about the request.
        waiting: Option<Waiting>,
    },
    /// The idempotency key was used with another payload. Nothing was stored.
    Mismatch,
    /// There are as many unfinished requests as there may be. Nothing was stored.
    Full,
    /// The message differs from one that is stored under the same digest. Nothing was stored. Nobody meets that by chance.
    Collision,
}
