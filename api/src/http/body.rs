//! The body of a POST: read up to a limit, parsed once, every flaw reported with its place.

use std::collections::BTreeMap;
use std::sync::Arc;

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use poem::http::{HeaderName, HeaderValue};
use poem::{Request, RequestBody};
use poem_openapi::payload::{Json, Payload};
use poem_openapi::registry::{MetaMediaType, MetaRequest, Registry};
use poem_openapi::types::Type;
use poem_openapi::{ApiExtractor, ApiExtractorType, ExtractParamOptions, Object};
use serde_json::{Map, Value};
use shared::address_guard::{Forbidden, canonical};
use shared::message::Message;
use shared::secret::Secret;
use shared::store::accept::WebhookTarget;
use tokio::time::Instant;
use url::Url;

use super::Services;
use super::fields::Fields;
use super::headers::{ACCEPTED_CLIENT_REQUEST_ID, is_client_request_id};
use super::problem::{ApiError, Flaw};
use super::read::read;

/// The body of a POST.
// This type only documents the body, and `document` makes it exact; the body is parsed into `Posted`.
#[derive(Object)]
#[oai(rename_all = "camelCase")]
pub struct SignRequest {
    /// The text to sign, used exactly as it is: 1 to `MESSAGE_MAX_BYTES` bytes of UTF-8.
    #[oai(validator(min_length = 1))]
    message: String,
    /// Where the outcome is posted, following the Standard Webhooks specification: http or https, without credentials, on the ports 80,
    /// 443, or 1024 and above; a name or a public address. (More addresses are accepted than the pattern matches.)
    #[oai(validator(max_length = 2048))]
    webhook_url: Option<String>,
    /// Headers that are sent along with the webhook. `host`, `content-*`, `webhook-*`, `traceparent` and hop-by-hop headers are left out.
    /// Without a `webhookUrl` they mean nothing, and are no part of the payload.
    webhook_headers: Option<BTreeMap<String, String>>,
    /// Idempotency key: the same key with the same payload is the same request. The header `Idempotency-Key` means the same.
    #[oai(validator(min_length = 1, max_length = 128, pattern = r"^[^\u0000-\u001F\u007F-\u009F\u2028\u2029]+$"))]
    client_request_id: Option<String>,
}

/// A valid body.
#[derive(Debug)]
pub struct Posted {
    /// The message to sign.
    pub message: Message,
    /// Where the outcome is sent.
    pub webhook: Option<WebhookTarget>,
    /// The caller's idempotency key.
    pub client_request_id: Option<String>,
    /// When the last byte of the body arrived.
    pub received_at: Instant,
}

const LONGEST_URL: usize = 2048;
/// Maximum number of headers that are sent along.
pub const MOST_HEADERS: usize = 32;
/// Maximum length of the name of one, in characters.
pub const LONGEST_HEADER_NAME: usize = 256;
/// Maximum length of its value, in characters.
pub const LONGEST_HEADER_VALUE: usize = 2048;

/// Maximum number of flaws that are reported, and of characters of the place of each.
const MOST_FLAWS: usize = 32;
const LONGEST_POINTER: usize = 512;

/// Maximum number of bytes of a body besides its message: the headers, the address, the names of fields, white space.
const BESIDES: usize = MOST_HEADERS * (LONGEST_HEADER_NAME + 2 * JSON_ESCAPE * LONGEST_HEADER_VALUE) + 64 * 1024;

/// A byte of a message takes up to six bytes in JSON: `\u0000`. A character that is not among the first 65,536 takes twice as many.
const JSON_ESCAPE: usize = 6;

impl<'a> ApiExtractor<'a> for Posted {
    const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::RequestObject];
    type ParamType = ();
    type ParamRawType = ();

    fn register(registry: &mut Registry) {
        SignRequest::register(registry);
    }

    fn request_meta() -> Option<MetaRequest> {
        let content = vec![MetaMediaType { content_type: "application/json", schema: SignRequest::schema_ref() }];
        Some(MetaRequest { description: None, content, required: true })
    }

    async fn from_request(request: &'a Request, body: &mut RequestBody, _: ExtractParamOptions<()>) -> poem::Result<Self> {
        if !request.content_type().is_some_and(Json::<SignRequest>::check_content_type) {
            return Err(ApiError::NotJson.into());
        }
        let Services { limits, webhook_addresses, .. } = &**request.data::<Arc<Services>>().ok_or(ApiError::Internal)?;
        let most = limits.message_max_bytes;
        let bytes = read(request, body.take()?, most * JSON_ESCAPE + BESIDES).await?;
        let received_at = Instant::now();
        let mut parsed = Parsed::of(&bytes)?;
        if let Some((_, url)) = &parsed.webhook
            && let Err(forbidden) = webhook_addresses.judge(url).await?
        {
            parsed.flaws.push(Flaw::at("#/webhookUrl", accepted(forbidden)));
        }
        Ok(parsed.posted(most, received_at)?)
    }
}

/// The valid fields of a body, and the flaws of the others.
#[derive(Debug)]
struct Parsed {
    message: Option<String>,
    /// The address as posted, and parsed.
    webhook: Option<(String, Url)>,
    webhook_headers: BTreeMap<String, String>,
    client_request_id: Option<String>,
    flaws: Vec<Flaw>,
}

impl Parsed {
    /// Parses a body. Does not check whether a webhook may be sent to its address.
    ///
    /// # Errors
    /// `Invalid` if it is not a JSON object.
    fn of(bytes: &[u8]) -> Result<Self, ApiError> {
        let Fields { values: mut fields, repeated } = serde_json::from_slice(bytes).map_err(|error| {
            let not_json = || format!("not JSON: line {}, column {}", error.line(), error.column());
            ApiError::Invalid(vec![Flaw::at("#", if error.is_data() { "accepted: an object".to_owned() } else { not_json() })])
        })?;
        let mut flaws: Vec<Flaw> = repeated.iter().map(|name| Flaw::at(format!("#/{}", escaped(name)), "there more than once")).collect();
        if !fields.contains_key("message") {
            flaws.push(Flaw::at("#/message", "missing"));
        }
        let message =
            text(&mut fields, "message", &mut flaws, |text| if text.is_empty() { Err("accepted: at least one byte") } else { Ok(()) });
        let mut url = None;
        let posted_url = text(&mut fields, "webhookUrl", &mut flaws, |text| {
            url = Some(parse_url(text)?);
            Ok(())
        });
        let webhook_headers = headers(fields.remove("webhookHeaders"), &mut flaws);
        let check_id = |id: &str| if is_client_request_id(id) { Ok(()) } else { Err(ACCEPTED_CLIENT_REQUEST_ID) };
        let client_request_id = text(&mut fields, "clientRequestId", &mut flaws, check_id);
        for name in fields.keys() {
            let accepted = "unknown field; accepted: message, webhookUrl, webhookHeaders, clientRequestId";
            flaws.push(Flaw::at(format!("#/{}", escaped(name)), accepted));
        }
        Ok(Self { message, webhook: posted_url.zip(url), webhook_headers, client_request_id, flaws })
    }

    /// Returns the request, if it has no flaws.
    ///
    /// # Errors
    /// `Invalid` with all flaws; `MessageTooLong` if there are none but the message has more than `most` bytes.
    fn posted(self, most: usize, received_at: Instant) -> Result<Posted, ApiError> {
        let Some(message) = self.message.filter(|_| self.flaws.is_empty()) else {
            return Err(ApiError::Invalid(first_flaws(self.flaws)));
        };
        if message.len() > most {
            return Err(ApiError::MessageTooLong(most));
        }
        let headers = Secret::new(self.webhook_headers);
        let webhook = self.webhook.map(|(posted, url)| WebhookTarget::new(posted, &url, headers));
        Ok(Posted { message: Message::new(message), webhook, client_request_id: self.client_request_id, received_at })
    }
}

/// The flaws as they are reported: a body may have a hundred thousand, with names as long as the body.
fn first_flaws(mut flaws: Vec<Flaw>) -> Vec<Flaw> {
    let more = flaws.len().saturating_sub(MOST_FLAWS);
    flaws.truncate(MOST_FLAWS);
    for flaw in &mut flaws {
        if let Some((end, _)) = flaw.pointer.char_indices().nth(LONGEST_POINTER) {
            flaw.pointer.truncate(end);
        }
    }
    flaws.extend((more > 0).then(|| Flaw::at("#", format!("and {more} more"))));
    flaws
}

/// Takes a text field. It may be missing; another type, or a value that `check` refuses, is a flaw.
fn text(
    fields: &mut Map<String, Value>,
    name: &str,
    flaws: &mut Vec<Flaw>,
    check: impl FnOnce(&str) -> Result<(), &'static str>,
) -> Option<String> {
    let problem = match fields.remove(name)? {
        Value::String(text) => match check(&text) {
            Ok(()) => return Some(text),
            Err(accepted) => accepted,
        },
        _ => "accepted: text",
    };
    flaws.push(Flaw::at(format!("#/{name}"), problem));
    None
}

const ACCEPTED_URL: &str = "accepted: an http or https address of up to 2048 characters, without credentials";

/// Parses the address of a receiver.
pub(super) fn parse_url(text: &str) -> Result<Url, &'static str> {
    // A URL parser silently removes control characters and white space: the address would not be the one that its author sees.
    if text.len() > LONGEST_URL || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(ACCEPTED_URL);
    }
    Ok(canonical(Url::parse(text).map_err(|_| ACCEPTED_URL)?))
}

/// What is accepted instead of a forbidden address.
const fn accepted(forbidden: Forbidden) -> &'static str {
    match forbidden {
        Forbidden::Scheme | Forbidden::Credentials => ACCEPTED_URL,
        Forbidden::Port => "accepted: the ports 80, 443, and 1024 and above",
        Forbidden::Address => "accepted: a name, or an address of the public internet",
    }
}

fn headers(value: Option<Value>, flaws: &mut Vec<Flaw>) -> BTreeMap<String, String> {
    let mut headers = BTreeMap::new();
    let given = match value {
        None => return headers,
        Some(Value::Object(given)) if given.len() <= MOST_HEADERS => given,
        Some(_) => {
            flaws.push(Flaw::at("#/webhookHeaders", format!("accepted: an object of up to {MOST_HEADERS} header names with their values")));
            return headers;
        }
    };
    for (name, value) in given {
        if let Some((name, value)) = value.as_str().and_then(|value| check_header(&name, value)) {
            // Names that differ only in case are one header.
            headers.insert(name, value);
        } else {
            let accepted =
                format!("accepted: a header name of up to {LONGEST_HEADER_NAME} characters with a value of up to {LONGEST_HEADER_VALUE}");
            flaws.push(Flaw::at(format!("#/webhookHeaders/{}", escaped(&name)), accepted));
        }
    }
    headers
}

/// A header as it is sent. `None` if it is not valid.
pub(super) fn check_header(name: &str, value: &str) -> Option<(String, String)> {
    let (header, _) = HeaderName::try_from(name).ok().zip(HeaderValue::try_from(value).ok())?;
    (name.len() <= LONGEST_HEADER_NAME && value.chars().count() <= LONGEST_HEADER_VALUE)
        .then(|| (header.as_str().to_owned(), value.to_owned()))
}

/// Escapes a name for a JSON pointer (RFC 6901) in a URI fragment: percent-encoded except for the allowed characters (RFC 3986, 3.5).
fn escaped(name: &str) -> String {
    const ESCAPES: AsciiSet = CONTROLS
        .add(b' ')
        .add(b'"')
        .add(b'#')
        .add(b'%')
        .add(b'<')
        .add(b'>')
        .add(b'[')
        .add(b'\\')
        .add(b']')
        .add(b'^')
        .add(b'`')
        .add(b'{')
        .add(b'|')
        .add(b'}');
    utf8_percent_encode(&name.replace('~', "~0").replace('/', "~1"), &ESCAPES).to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;
    use shared::address_guard::{AddressSettings, Guard};

    use super::*;

    fn parse(bytes: &[u8], most: usize) -> Result<Posted, ApiError> {
        Parsed::of(bytes)?.posted(most, Instant::now())
    }

    fn pointers(body: &Value) -> Vec<String> {
        match parse(body.to_string().as_bytes(), 4096) {
            Err(ApiError::Invalid(flaws)) => flaws.into_iter().map(|flaw| flaw.pointer).collect(),
            other => panic!("{body}: {other:?}"),
        }
    }

    #[test]
    fn every_flaw_is_named_with_its_place() {
        let body =
            json!({ "message": 1, "webhookUrl": "a b", "clientRequestId": "\n", "webhookHeaders": { "a b": "c", "x/y": 1 }, "no~p%e": 1 });
        let expected = ["#/message", "#/webhookUrl", "#/webhookHeaders/a%20b", "#/webhookHeaders/x~1y", "#/clientRequestId", "#/no~0p%25e"];
        assert_eq!(pointers(&body), expected);
        assert_eq!(pointers(&json!({})), ["#/message"]);
        assert_eq!(pointers(&json!({ "message": "" })), ["#/message"]);
        assert_eq!(pointers(&json!({ "message": "m", "webhookUrl": null })), ["#/webhookUrl"]);
        assert_eq!(pointers(&json!(["message"])), ["#"]);
    }

    #[test]
    fn a_field_that_is_there_twice_is_a_flaw() {
        let parsed = Parsed::of(br#"{ "message": "a", "message": "a", "clientRequestId": "b" }"#).unwrap();
        assert_eq!(parsed.flaws.iter().map(|flaw| flaw.pointer.as_str()).collect::<Vec<_>>(), ["#/message"]);
        for (body, detail) in [("[1", "accepted: an object"), ("{} {}", "not JSON: line 1, column 4"), ("{", "not JSON: line 1, column 1")]
        {
            let Err(ApiError::Invalid(flaws)) = Parsed::of(body.as_bytes()) else { panic!("it is invalid") };
            assert_eq!(flaws[0].detail, detail);
        }
    }

    #[test]
    fn however_many_flaws_a_body_has_and_however_long_their_names_are_the_answer_stays_short() {
        let many = || (0..50_000).map(|n| (format!("field {n}"), json!(0)));
        let long = || std::iter::once(("é".repeat(100_000), json!(0)));
        let bodies: [Map<String, Value>; 2] = [many().chain(long()).collect(), long().chain(many()).collect()];
        for body in bodies {
            let Err(ApiError::Invalid(flaws)) = parse(Value::Object(body).to_string().as_bytes(), 4096) else { panic!("it is invalid") };
            assert_eq!((flaws.len(), flaws[0].pointer.as_str()), (MOST_FLAWS + 1, "#/message"));
            assert_eq!(flaws[MOST_FLAWS].detail, format!("and {} more", 50_002 - MOST_FLAWS));
            assert!(flaws.iter().all(|flaw| flaw.pointer.len() <= LONGEST_POINTER));
        }
    }

    #[test]
    fn addresses_with_credentials_or_another_scheme_are_refused() {
        let guard = Guard::new(&AddressSettings::default());
        for url in [
            "http://u:p@h/",
            "http://u@h/",
            "file:///etc/passwd",
            "javascript:1",
            "//h/",
            "h",
            "http://",
            "http://127.0.0.1/",
            "http://0x7f.1:8080/",
            "http://[::ffff:10.0.0.1]/",
            "http://example.com:22/",
            &format!("http://h/{}", "x".repeat(2048)),
        ] {
            let refused = match parse_url(url) {
                Ok(parsed) => guard.check(&parsed).map_err(accepted),
                Err(accepted) => Err(accepted),
            };
            assert!(refused.is_err_and(|accepted| accepted.starts_with("accepted: ")), "{url}");
        }
        assert_eq!(guard.check(&parse_url("https://example.com:8443/hook?a=b#c").unwrap()), Ok(()));
    }

    #[test]
    fn a_message_is_measured_in_bytes() {
        let body = |message: String| json!({ "message": message }).to_string();
        assert!(parse(body("é".repeat(2048)).as_bytes(), 4096).is_ok());
        assert!(matches!(parse(body("é".repeat(2049)).as_bytes(), 4096), Err(ApiError::MessageTooLong(4096))));
    }

    proptest! {
        #[test]
        fn a_message_is_kept_byte_for_byte(message in "\\PC{1,200}|[\\x00-\\x7f]{1,200}") {
            let posted = parse(json!({ "message": message }).to_string().as_bytes(), 4096).unwrap();
            prop_assert_eq!(posted.message.text(), message);
        }

        #[test]
        fn parsing_never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes, 4096);
        }
    }
}
