//! Request headers with a grammar of their own: `Prefer` and `Idempotency-Key`. Pure.

use std::time::Duration;

use poem::http::HeaderMap;

/// The preferences of a caller (RFC 7240). Those that can't be understood are ignored, as the RFC demands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Preferences {
    /// Answer without waiting.
    pub respond_async: bool,
    /// Wait this long, in whole seconds.
    pub wait: Option<u32>,
}

impl Preferences {
    /// Reads every `Prefer` header. If a preference is given twice, the first one counts.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Self {
        let mut preferences = Self::default();
        let lines = headers.get_all("prefer").iter().filter_map(|value| value.to_str().ok());
        for preference in lines.flat_map(|line| unquoted_parts(line, ',')) {
            let preference = unquoted_parts(preference, ';').next().unwrap_or_default().trim();
            let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "respond-async" => preferences.respond_async = true,
                "wait" if preferences.wait.is_none() => preferences.wait = seconds(value.trim().trim_matches('"')),
                _ => {}
            }
        }
        preferences
    }

    /// How long to wait: the preferred time, at most `most`; `otherwise` if there is no preference.
    #[must_use]
    pub fn wait_or(&self, otherwise: Duration, most: Duration) -> Duration {
        match self.wait {
            Some(seconds) => Duration::from_secs(seconds.into()).min(most),
            None if self.respond_async => Duration::ZERO,
            None => otherwise,
        }
    }

    /// The value of `Preference-Applied`. `None` if no preference was applied. The wait is left out unless the caller `may_wait`.
    #[must_use]
    pub fn applied(&self, most: Duration, may_wait: bool) -> Option<String> {
        let wait = self.wait.filter(|_| may_wait).map(|seconds| format!("wait={}", u64::from(seconds).min(most.as_secs())));
        let respond_async = self.respond_async.then(|| "respond-async".to_owned());
        let applied: Vec<String> = respond_async.into_iter().chain(wait).collect();
        (!applied.is_empty()).then(|| applied.join(", "))
    }
}

/// Splits `text` at `separator`, except inside quoted strings.
fn unquoted_parts(text: &str, separator: char) -> impl Iterator<Item = &str> {
    let (mut quoted, mut escaped) = (false, false);
    text.split(move |c| {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            _ => return c == separator && !quoted,
        }
        false
    })
}

/// Parses a number of seconds. A number that is too large for any wait becomes the largest.
fn seconds(text: &str) -> Option<u32> {
    let is_number = !text.is_empty() && text.bytes().all(|digit| digit.is_ascii_digit());
    is_number.then(|| text.parse().unwrap_or(u32::MAX))
}

/// What `clientRequestId` accepts.
pub const ACCEPTED_CLIENT_REQUEST_ID: &str = "accepted: 1 to 128 printable characters";
/// Maximum number of characters of one.
pub const LONGEST_CLIENT_REQUEST_ID: usize = 128;

/// Whether `text` is a valid client request id.
#[must_use]
pub fn is_client_request_id(text: &str) -> bool {
    (1..=LONGEST_CLIENT_REQUEST_ID).contains(&text.chars().count())
        && !text.chars().any(|c| c.is_control() || matches!(c, '\u{2028}' | '\u{2029}'))
}

/// Reads `Idempotency-Key`: bare, or as a string of RFC 9651 (in quotes, with `\"` and `\\` as escapes).
///
/// # Errors
/// If the header is there but is not a valid client request id, or is there twice.
pub fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, &'static str> {
    const REFUSED: &str = "Idempotency-Key: accepted: 1 to 128 printable characters, bare or in quotes, once";
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else { return Ok(None) };
    let text = std::str::from_utf8(value.as_bytes()).map_err(|_| REFUSED)?.trim_matches([' ', '\t']);
    let key = match text.strip_prefix('"') {
        Some(quoted) => unquoted(quoted).ok_or(REFUSED)?,
        None => text.to_owned(),
    };
    if values.next().is_none() && is_client_request_id(&key) { Ok(Some(key)) } else { Err(REFUSED) }
}

/// Parses a string after its opening quote. `None` unless it ends with its closing quote.
fn unquoted(text: &str) -> Option<String> {
    let mut key = String::new();
    let mut characters = text.chars();
    loop {
        match characters.next()? {
            '"' => return characters.next().is_none().then_some(key),
            '\\' => key.push(characters.next().filter(|c| matches!(c, '"' | '\\'))?),
            other => key.push(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(name: &'static str, values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn prefers(values: &[&str]) -> Preferences {
        Preferences::of(&headers("prefer", values))
    }

    #[test]
    fn preferences_are_read_and_what_is_unknown_is_ignored() {
        assert_eq!(prefers(&["respond-async"]), Preferences { respond_async: true, wait: None });
        assert_eq!(prefers(&["handling=lenient, Wait=10; x=y"]), Preferences { respond_async: false, wait: Some(10) });
        assert_eq!(prefers(&["respond-async", "wait=5, wait=9"]), Preferences { respond_async: true, wait: Some(5) });
        assert_eq!(prefers(&["wait=soon, wait=-1, wait"]), Preferences::default());
        assert_eq!(
            prefers(&[r#"note="x, respond-async; \", wait=3", wait="7"; a="b;c""#]),
            Preferences { respond_async: false, wait: Some(7) }
        );
    }

    #[test]
    fn a_wait_is_capped_and_said() {
        let (otherwise, most) = (Duration::from_millis(1500), Duration::from_mins(1));
        assert_eq!(prefers(&[]).wait_or(otherwise, most), otherwise);
        assert_eq!(prefers(&["respond-async"]).wait_or(otherwise, most), Duration::ZERO);
        assert_eq!(prefers(&["wait=100"]).wait_or(otherwise, most), most);
        assert_eq!(prefers(&["wait=99999999999999999999"]).wait_or(otherwise, most), most);
        assert_eq!(prefers(&["wait=100"]).applied(most, true).as_deref(), Some("wait=60"));
        assert_eq!(prefers(&["respond-async, wait=3"]).applied(most, true).as_deref(), Some("respond-async, wait=3"));
        assert_eq!(prefers(&["respond-async, wait=3"]).applied(most, false).as_deref(), Some("respond-async"));
        assert_eq!(prefers(&["foo"]).applied(most, true), None);
    }

    #[test]
    fn an_idempotency_key_is_the_same_bare_or_quoted() {
        let read = |text: &str| idempotency_key(&headers("idempotency-key", &[text]));
        assert_eq!(read("abc-1"), Ok(Some("abc-1".to_owned())));
        assert_eq!(read("\"abc-1\""), read("abc-1"));
        assert_eq!(read("\u{3000}a\t"), Ok(Some("\u{3000}a".to_owned())), "as the body says it");
        assert_eq!(read(r#""a\"b\\c""#), Ok(Some(r#"a"b\c"#.to_owned())));
        for text in ["", "\"", "\"a", "\"a\"b", r#""\x""#, &"x".repeat(129)] {
            assert!(read(text).is_err(), "{text}");
        }
        assert_eq!(idempotency_key(&HeaderMap::new()), Ok(None));
        assert!(idempotency_key(&headers("idempotency-key", &["a", "b"])).is_err());
    }

    proptest! {
        #[test]
        fn reading_headers_never_panics(text in "[ -~]{0,200}") {
            let _ = (prefers(&[&text]), idempotency_key(&headers("idempotency-key", &[&text])));
        }
    }
}
