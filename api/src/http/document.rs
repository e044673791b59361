//! The OpenAPI document: the output of `poem-openapi`, completed where it cannot express what we accept.
//!
//! It writes version 3.0.0, which has no webhooks; everything else that it writes for us means the same in 3.1. A request that is valid by
//! the document is accepted, unless its message is too long (413), it has two different idempotency keys (400), or its key was used for
//! something else (422).

use serde_json::{Value, json};

use super::body::{LONGEST_HEADER_NAME, LONGEST_HEADER_VALUE, MOST_HEADERS};
use super::headers::LONGEST_CLIENT_REQUEST_ID;

/// The first version that has webhooks.
const VERSION: &str = "3.1.0";

/// Patterns for receivers: names whose last label begins with a letter (with a digit it could be an address), and addresses from networks
/// that are public as a whole. There are more, and they are accepted too, but a pattern for them would be unreadable.
const RECEIVER: [&str; 3] = [
    r"([A-Za-z0-9-]+\.)*[A-Za-z][A-Za-z0-9-]*",
    concat!(
        r"([1-9]|1[1-9]|[2-9][0-9]|10[1-9]|11[0-9]|12[0-689]|1[345][0-9]|16[0-7]|17[013-9]|18[0-9]|19[01345679]|20[0124-9]|21[0-9]|22[0-3])",
        r"(\.(25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])){3}"
    ),
    r"\[2[457-9A-Fa-f][0-9A-Fa-f]{2}(:[0-9A-Fa-f]{1,4}){7}\]",
];

/// The ports 80, 443, and all from 1024 on.
const PORT: &str =
    "80|443|102[4-9]|10[3-9][0-9]|1[1-9][0-9]{2}|[2-9][0-9]{3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]";

/// Completes the document that `poem-openapi` wrote. It has no maximum length for the message: that is measured in bytes, and a longer
/// message is answered with 413, not 400.
#[must_use]
pub fn completed(written: &str) -> String {
    let mut document: Value = serde_json::from_str(written).expect("poem-openapi writes JSON");
    document["openapi"] = json!(VERSION);
    let request = &mut document["components"]["schemas"]["SignRequest"];
    request["additionalProperties"] = json!(false);
    let fields = &mut request["properties"];
    fields["webhookUrl"]["pattern"] = json!(webhook_url());
    fields["webhookHeaders"]["maxProperties"] = json!(MOST_HEADERS);
    fields["webhookHeaders"]["propertyNames"] = json!({ "pattern": header_name() });
    fields["webhookHeaders"]["additionalProperties"] =
        json!({ "type": "string", "maxLength": LONGEST_HEADER_VALUE, "pattern": HEADER_VALUE });
    let parameters = document["paths"]["/crypto/sign"]["post"]["parameters"].as_array_mut();
    for parameter in parameters.into_iter().flatten().filter(|parameter| parameter["name"] == "Idempotency-Key") {
        parameter["schema"]["pattern"] = json!(idempotency_key());
    }
    serde_json::to_string_pretty(&document).expect("a value is written as it is")
}

fn webhook_url() -> String {
    format!("^[Hh][Tt][Tt][Pp][Ss]?://({})(:({PORT}))?([/?#][!-~]*)?$", RECEIVER.join("|"))
}

/// A token of RFC 9110, 5.6.2.
fn header_name() -> String {
    format!("^[!#$%&'*+.^_`|~0-9A-Za-z-]{{1,{LONGEST_HEADER_NAME}}}$")
}

/// All characters except control characters; a tab is allowed.
const HEADER_VALUE: &str = r"^[^\u0000-\u0008\u000A-\u001F\u007F]*$";

/// Bare, without surrounding white space, or in quotes. Non-ASCII characters are accepted too, but few clients send them.
fn idempotency_key() -> String {
    let rest = LONGEST_CLIENT_REQUEST_ID - 2;
    format!(r#"^([!#-~]([ -~]{{0,{rest}}}[!-~])?|"([ !#-\[\]-~]|\\["\\]){{1,{LONGEST_CLIENT_REQUEST_ID}}}")$"#)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::string::string_regex;

    use super::super::body::{check_header, parse_url};
    use super::super::headers;
    use super::*;

    /// Strings that match a pattern of the document.
    fn matching(pattern: &str) -> impl Strategy<Value = String> + use<> {
        string_regex(pattern.strip_prefix('^').unwrap().strip_suffix('$').unwrap()).unwrap()
    }

    proptest! {
        #[test]
        fn a_receiver_that_is_valid_by_the_document_is_accepted(url in matching(&webhook_url())) {
            let guard = shared::address_guard::Guard::new(&shared::address_guard::AddressSettings::default());
            // A label that looks like an encoded name is one only if it can be decoded.
            prop_assume!(!url.to_ascii_lowercase().contains("xn--"));
            prop_assert_eq!(guard.check(&parse_url(&url).unwrap()), Ok(()), "{}", url);
        }

        #[test]
        fn a_header_that_is_valid_by_the_document_is_accepted(name in matching(&header_name()), value in "[^\\x00-\\x08\\x0A-\\x1F\\x7F]{0,2048}") {
            prop_assert!(check_header(&name, &value).is_some(), "{name}: {value}");
        }

        #[test]
        fn an_idempotency_key_that_is_valid_by_the_document_is_accepted(key in matching(&idempotency_key())) {
            let headers = [("idempotency-key".parse().unwrap(), key.parse().unwrap())].into_iter().collect();
            prop_assert!(headers::idempotency_key(&headers).unwrap().is_some(), "{key}");
        }
    }

    #[test]
    fn the_document_is_of_a_version_that_knows_webhooks_and_says_what_is_refused() {
        let document: Value = serde_json::from_str(&super::super::spec()).unwrap();
        assert_eq!(document["openapi"], VERSION);
        assert!(document["webhooks"]["outcome"]["post"].is_object());
        let request = &document["components"]["schemas"]["SignRequest"];
        assert_eq!((&request["additionalProperties"], &request["properties"]["message"]["minLength"]), (&json!(false), &json!(1)));
        let key = &document["paths"]["/crypto/sign"]["post"]["parameters"][1];
        assert_eq!((&key["name"], &key["schema"]["pattern"]), (&json!("Idempotency-Key"), &json!(idempotency_key())));
        // Keywords that differ between the two versions.
        for word in ["nullable", "exclusiveMinimum", "exclusiveMaximum"] {
            assert!(!document.to_string().contains(word), "{word}");
        }
    }
}
