//! The `Retry-After` header, which both upstreams and receivers send.

use std::time::{Duration, SystemTime};

use http::HeaderMap;
use http::header::{DATE, RETRY_AFTER};

/// Reads `Retry-After`, which is a number of seconds or a date (RFC 9110, section 10.2.3). A date is compared with the clock that made it,
/// as told by `Date`; `now` is used for an answer without `Date`.
#[must_use]
pub fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = |name| headers.get(name)?.to_str().ok().map(str::trim);
    let date = |text| httpdate::parse_http_date(text).ok();
    let value = text(RETRY_AFTER)?;
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        return Some(Duration::from_secs(value.parse().unwrap_or(u64::MAX)));
    }
    let now = text(DATE).and_then(date).unwrap_or(now);
    Some(date(value)?.duration_since(now).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date_and_anything_else_is_nothing() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        let read = |text: &str| retry_after(&HeaderMap::from_iter([(RETRY_AFTER, text.parse().unwrap())]), now);
        assert_eq!(read("120"), Some(Duration::from_mins(2)));
        assert_eq!(read("Sun, 06 Nov 1994 08:50:07 GMT"), Some(Duration::from_secs(30)));
        assert_eq!(read("Sun, 06 Nov 1994 08:40:00 GMT"), Some(Duration::ZERO));
        assert_eq!(read("99999999999999999999"), Some(Duration::from_secs(u64::MAX)));
        assert_eq!((read("garbage"), read("-1"), read("1.5")), (None, None, None));
    }

    #[test]
    fn a_date_is_read_by_the_clock_that_made_it_and_not_by_one_that_is_wrong() {
        let answer = [(DATE, "Sun, 06 Nov 1994 08:49:37 GMT"), (RETRY_AFTER, "Sun, 06 Nov 1994 08:50:07 GMT")];
        let headers = answer.map(|(name, value)| (name, value.parse().unwrap())).into_iter().collect();
        for wrong in ["Sun, 06 Nov 1994 08:09:37 GMT", "Sun, 06 Nov 1994 09:49:37 GMT"] {
            assert_eq!(retry_after(&headers, httpdate::parse_http_date(wrong).unwrap()), Some(Duration::from_secs(30)), "{wrong}");
        }
    }
}
