//! A bound that no scheduler can beat, not even one that knows every outage before it begins: the earliest possible end.
//!
//! The oracle obeys the rules of the world: a call does not begin before its message is posted; an outage is counted from the message's
//! first call, and that call has to be made; no window holds more calls than the rate allows, counted at their arrival. The oracle has more
//! than any real scheduler has: answers take no time, clocks do not drift, and no call is wasted: one for a message that works, two for one
//! that fails. [`earliest_end`] is the largest of three times that no schedule can undercut. There may be no schedule that reaches it, so a
//! ratio to it is never better than the ratio to the best schedule. (`tests` compares it with actual schedules.)

use std::time::Duration;

use super::world::World;

/// A time before which no schedule can have signed every message.
#[must_use]
pub fn earliest_end(world: &World) -> Duration {
    let calls = usize::from(world.rate.calls());
    let failing = || world.messages.iter().filter(|message| !message.outage.is_zero());

    // 1. The budget: every message costs a call, not before it is posted, and a failing one costs another call, not before its outage can
    //    be over. The k-th such call is not before the k-th of these times, nor within a window of the call `calls` before it.
    let mut useful: Vec<Duration> = world.messages.iter().map(|message| message.arrives).collect();
    useful.extend(failing().map(|message| message.arrives + message.outage));
    let budget = last_call(useful, calls, world.rate.window());

    // 2. Each outage: the end is not before the outage can be over. (Contained in 3 for a set of one message; kept for clarity.)
    let outage = world.messages.iter().map(|message| message.arrives + message.outage).max();

    // 3. Outages that have to be started: of the messages that fail for at least some length, one gets its first call last, and not before
    //    the budget has admitted the first calls of all of them. Its second call comes at least that length later.
    let mut by_length: Vec<_> = failing().collect();
    by_length.sort_by_key(|message| std::cmp::Reverse(message.outage));
    let begun = (1..=by_length.len()).map(|count| {
        let firsts = by_length[..count].iter().map(|message| message.arrives).collect();
        last_call(firsts, calls, world.rate.window()) + by_length[count - 1].outage
    });
    budget.max(outage.unwrap_or_default()).max(begun.max().unwrap_or_default())
}

/// The time of the last of these calls if each is made as early as it can be and the budget allows.
fn last_call(mut earliest: Vec<Duration>, calls: usize, window: Duration) -> Duration {
    earliest.sort_unstable();
    for index in 0..earliest.len() {
        if let Some(before) = index.checked_sub(calls) {
            earliest[index] = earliest[index].max(earliest[before] + window);
        }
    }
    earliest.last().copied().unwrap_or_default()
}
