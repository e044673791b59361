//! What nobody can beat: the earliest end that any scheduler could reach, one that knows every outage before it begins included.
//!
//! The oracle obeys the world's rules: a call begins not before its message was posted; an outage is counted from the message's first
//! call, and somebody has to make that call; no window holds more calls than the rate allows, at their arrival. It is given more than
//! any real scheduler has: answers take no time, clocks do not drift, and no call is wasted: one for a message that works, two for one
//! that fails. [`earliest_end`] is the largest of three times that no schedule can undercut. Nothing says that one schedule reaches it; so
//! a ratio to it is never better than the ratio to the best schedule. (`tests` hold it against schedules that were made.)

use std::time::Duration;

use super::world::World;

/// A time before which no schedule can have signed every message.
#[must_use]
pub fn earliest_end(world: &World) -> Duration {
    let calls = usize::from(world.rate.calls());
    let failing = || world.messages.iter().filter(|message| !message.outage.is_zero());

    // 1. The budget: every message costs a call when it is posted, and one more when its outage can be over at the earliest; the
    //    k-th such call is not before the k-th such moment, nor within a window of the call `calls` before it.
    let mut useful: Vec<Duration> = world.messages.iter().map(|message| message.arrives).collect();
    useful.extend(failing().map(|message| message.arrives + message.outage));
    let budget = last_call(useful, calls, world.rate.window());

    // 2. Each outage: not before it can be over. (Contained in 3 for the set of one message, kept for its plainness.)
    let outage = world.messages.iter().map(|message| message.arrives + message.outage).max();

    // 3. Outages that have to be begun: of the messages that fail for at least some length, one is called first last, and not before
    //    the budget has let all of them through; its second call comes at least that length later.
    let mut by_length: Vec<_> = failing().collect();
    by_length.sort_by_key(|message| std::cmp::Reverse(message.outage));
    let begun = (1..=by_length.len()).map(|count| {
        let firsts = by_length[..count].iter().map(|message| message.arrives).collect();
        last_call(firsts, calls, world.rate.window()) + by_length[count - 1].outage
    });
    budget.max(outage.unwrap_or_default()).max(begun.max().unwrap_or_default())
}

/// When the last of these calls is made if each is made as soon as it can be and the budget has room.
fn last_call(mut earliest: Vec<Duration>, calls: usize, window: Duration) -> Duration {
    earliest.sort_unstable();
    for index in 0..earliest.len() {
        if let Some(before) = index.checked_sub(calls) {
            earliest[index] = earliest[index].max(earliest[before] + window);
        }
    }
    earliest.last().copied().unwrap_or_default()
}
