//! Receivers, as a claim of webhooks tells them apart, and the room that a process has for the jobs of each.

use std::time::Duration;

use uuid::Uuid;

/// A probe that has been due for longer than this shows that nobody watched the receiver.
pub(super) const WATCHED_WITHIN: Duration = Duration::from_hours(1);

/// Identifies a receiver: an address without its identifiers, for one API key (`receiver_of` in the migrations).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReceiverId(pub Uuid);

/// What is known about a receiver. New and troubled ones may hold a call for long, so each of these standings has a limited share of the
/// calls, and can't get in the way of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It works, and is fast.
    Good,
    /// Nothing is known, or it has failed once: the next delivery will show.
    New,
    /// It fails, or it is slow.
    Troubled,
}

/// What a process wants to claim.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The maximum number of jobs.
    pub most: usize,
    /// The maximum number of jobs of one receiver that this process wants to hold, including those that it holds already.
    pub per_receiver: u32,
    /// The jobs that this process holds already.
    pub held: Vec<Held>,
    /// The maximum number of jobs of receivers that are [new](Standing::New).
    pub newcomers: Room,
    /// The maximum number of jobs of receivers that are [troubled](Standing::Troubled).
    pub troubled: Room,
}

/// The jobs of one receiver that a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The receiver.
    pub receiver: ReceiverId,
    /// How many they are.
    pub jobs: u32,
    /// How many of them were claimed while it was [new](Standing::New).
    pub as_new: u32,
    /// How many of them were claimed while it was [troubled](Standing::Troubled).
    pub as_troubled: u32,
}

/// Room for the jobs of receivers of one standing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// How many more jobs there is room for.
    pub in_all: u32,
    /// How many of one server there may be, including those that are held.
    pub of_one_server: u32,
}
