//! The query string, decoded like a form: `%XX` is a byte and `+` is a space.
//!
//! A client that does not encode a `+` asks for a different message than it meant, as with the real upstream.

/// The value of a parameter, as bytes; `None` if it is missing.
///
/// # Errors
/// If a `%` is not followed by two hexadecimal digits.
pub(super) fn parameter(query: &str, name: &str) -> Result<Option<Vec<u8>>, BadEscape> {
    for pair in query.split('&') {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        if decode(key)? == name.as_bytes() {
            return decode(value).map(Some);
        }
    }
    Ok(None)
}

/// A `%` that is not followed by two hexadecimal digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadEscape;

fn decode(text: &str) -> Result<Vec<u8>, BadEscape> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || bytes.next().and_then(|byte| char::from(byte).to_digit(16)).ok_or(BadEscape);
                let value = digit()? * 16 + digit()?;
                u8::try_from(value).expect("two hexadecimal digits make a byte")
            }
            plain => plain,
        });
    }
    Ok(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_plus_is_a_space_and_an_escape_is_a_byte() {
        let message = |query| parameter(query, "message");
        assert_eq!(message("message=a+b%2B%00%0A"), Ok(Some(b"a b+\0\n".to_vec())));
        assert_eq!(message("signature=x&message="), Ok(Some(Vec::new())));
        assert_eq!(message("signature=x"), Ok(None));
        assert_eq!(message(""), Ok(None));
        for wrong in ["message=%", "message=%4", "message=%zz", "message=100%"] {
            assert_eq!(message(wrong), Err(BadEscape), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn every_text_survives_the_trip(text in any::<String>()) {
            let encoded = percent_encoding::utf8_percent_encode(&text, percent_encoding::NON_ALPHANUMERIC);
            prop_assert_eq!(parameter(&format!("message={encoded}"), "message"), Ok(Some(text.into_bytes())));
        }
    }
}
