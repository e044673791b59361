//! Types for values in settings, parsed once at the edge: durations with a unit, and call rates.
//!
//! Each parser's error says what is accepted, so that the error line is enough to fix a wrong setting.

use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;
use std::time::Duration;

/// The longest duration that can be set: ten years. With this limit, sums of durations and points in time never overflow.
const LONGEST: Duration = Duration::from_hours(3650 * 24);

/// Parses a duration with a unit, such as `1500ms`, `30s`, `5m`, `24h`, `30d`. A bare `0` is zero.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn duration(text: &str) -> Result<Duration, String> {
    if text.trim() == "0" {
        return Ok(Duration::ZERO);
    }
    let parsed = humantime::parse_duration(text.trim()).ok().filter(|duration| *duration <= LONGEST);
    parsed.ok_or_else(|| "accepted: a duration with a unit, such as 250ms, 30s, 5m, 24h or 30d, up to 3650d".to_owned())
}

/// How many calls are allowed in any window of the given length, written `10/60s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    calls: NonZeroU16,
    window: Duration,
}

impl Rate {
    /// A rate of `calls` in any `window`.
    ///
    /// # Errors
    /// A sentence that says what is accepted: at least one call, and a window from 100 ms to a day.
    pub fn new(calls: u16, window: Duration) -> Result<Self, String> {
        let range = Duration::from_millis(100)..=Duration::from_hours(24);
        match NonZeroU16::new(calls) {
            Some(calls) if range.contains(&window) => Ok(Self { calls, window }),
            _ => Err(Self::ACCEPTED.to_owned()),
        }
    }

    const ACCEPTED: &'static str = "accepted: CALLS/WINDOW with 1 to 65535 calls and a window from 100ms to 24h, such as 10/60s";

    /// Calls allowed in one window; at least 1.
    #[must_use]
    pub fn calls(self) -> u16 {
        self.calls.get()
    }

    /// Length of the window.
    #[must_use]
    pub fn window(self) -> Duration {
        self.window
    }

    /// The mean time between two calls when the whole budget is spent.
    #[must_use]
    pub fn interval(self) -> Duration {
        self.window / u32::from(self.calls.get())
    }
}

impl FromStr for Rate {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (calls, window) = text.split_once('/').ok_or(Self::ACCEPTED)?;
        let calls = calls.trim().parse().map_err(|_| Self::ACCEPTED)?;
        let window = duration(window).map_err(|_| Self::ACCEPTED)?;
        Self::new(calls, window)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.calls, humantime::format_duration(self.window))
    }
}

/// A fraction, from 0 to 1.
///
/// # Errors
/// A sentence that says what is accepted.
pub fn fraction(text: &str) -> Result<f64, String> {
    let fraction = text.trim().parse().ok().filter(|fraction| (0.0..=1.0).contains(fraction));
    fraction.ok_or_else(|| "accepted: a number from 0 to 1".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_read_as_calls_per_window() {
        let rate: Rate = "10/60s".parse().unwrap();
        assert_eq!((rate.calls(), rate.window()), (10, Duration::from_mins(1)));
        assert_eq!(rate.interval(), Duration::from_secs(6));
        assert_eq!("4/1500ms".parse::<Rate>().unwrap().window(), Duration::from_millis(1500));
    }

    #[test]
    fn a_rate_that_could_never_be_kept_is_refused_with_what_is_accepted() {
        for text in ["", "10", "0/60s", "10/0s", "10/1ms", "ten/60s", "10/60", "-1/60s", "10/60s/2"] {
            assert!(text.parse::<Rate>().unwrap_err().contains("such as 10/60s"), "{text}");
        }
    }

    #[test]
    fn a_duration_needs_a_unit_unless_it_is_zero() {
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1500)));
        assert_eq!(duration("0"), Ok(Duration::ZERO));
        assert!(duration("15").unwrap_err().contains("with a unit"));
    }

    #[test]
    fn a_duration_that_would_overflow_when_it_is_added_is_refused() {
        assert_eq!(duration("3650d"), Ok(LONGEST));
        assert!(duration("18446744073709551615s").unwrap_err().contains("up to 3650d"));
    }
}
