//! The body of a POST: read up to a bound, parsed once, every flaw named with its place.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use poem::http::{HeaderName, HeaderValue};
use poem::{Body, Request, RequestBody};
use poem_openapi::payload::{Json, Payload};
use poem_openapi::registry::{MetaMediaType, MetaRequest, Registry};
use poem_openapi::types::Type;
use poem_openapi::{ApiExtractor, ApiExtractorType, ExtractParamOptions, Object};
use serde_json::{Map, Value};
use shared::address_guard::{Forbidden, Guard, canonical};
use shared::message::Message;
use shared::secret::Secret;
use shared::store::accept::WebhookTarget;
use tokio::io::AsyncReadExt;

use super::Parts;
use super::headers::{CLIENT_REQUEST_ID, is_client_request_id};
use super::problem::{ApiError, Flaw};

/// What is posted.
// This type is the documentation, made exact in `document`; `Posted` is what it is parsed into.
#[derive(Object)]
#[oai(rename_all = "camelCase")]
pub struct SignRequest {
    /// The text to sign, taken exactly as it is: 1 to `MESSAGE_MAX_BYTES` bytes of UTF-8.
    #[oai(validator(min_length = 1))]
    message: String,
    /// Where the outcome is posted by the Standard Webhooks specification: http or https, without credentials, on the ports 80, 443, or
    /// 1024 and above; a name or a public address. (More addresses are accepted than those that the pattern matches.)
    #[oai(validator(max_length = 2048))]
    webhook_url: Option<String>,
    /// Headers that are sent along with the webhook. `host`, `content-*`, `webhook-*`, `traceparent` and hop-by-hop headers are left out.
    webhook_headers: Option<BTreeMap<String, String>>,
    /// Idempotency key: the same key with the same payload is the same request. The header `Idempotency-Key` means the same.
    #[oai(validator(min_length = 1, max_length = 128, pattern = r"^[^\u0000-\u001F\u007F-\u009F\u2028\u2029]+$"))]
    client_request_id: Option<String>,
}

/// A body that is valid.
#[derive(Debug)]
pub struct Posted {
    /// What is to be signed.
    pub message: Message,
    /// Where the outcome is sent.
    pub webhook: Option<WebhookTarget>,
    /// The caller's idempotency key.
    pub client_request_id: Option<String>,
    /// How long it took to ask whether its webhook may be sent.
    pub asked_for: Duration,
}

/// A body may be trickled in for this long.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// Most bytes of a body that are read only for the sake of the answer.
const THROWN_AWAY: u64 = 8 * 1024 * 1024;

const LONGEST_URL: usize = 2048;
/// Most headers that are sent along.
pub const MOST_HEADERS: usize = 32;
/// Most characters of the name of one.
pub const LONGEST_HEADER_NAME: usize = 256;
/// Most characters of its value.
pub const LONGEST_HEADER_VALUE: usize = 1024;

/// Bytes of a body beside its message: the headers, and the address, the names of fields, white space.
const BESIDES: usize = MOST_HEADERS * (LONGEST_HEADER_NAME + 2 * ESCAPED * LONGEST_HEADER_VALUE) + 64 * 1024;

/// A byte of a message takes up to six in JSON: `\u0000`. A character that is not among the first 65,536 takes twice as many.
const ESCAPED: usize = 6;

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
        let Parts { limits, receivers, .. } = &**request.data::<Arc<Parts>>().ok_or(ApiError::Internal)?;
        let most = limits.message_max_bytes;
        let bytes = match tokio::time::timeout(READ_WITHIN, read(body.take()?, most * ESCAPED + BESIDES)).await {
            Ok(Ok(Some(bytes))) => bytes,
            Ok(Ok(None)) => return Err(ApiError::TooLarge.into()),
            Ok(Err(_)) => return Err(ApiError::Invalid(vec![flaw("#", "the body ended before its announced end")]).into()),
            Err(_) => return Err(ApiError::SlowBody.into()),
        };
        let parsed = parse(&bytes, most, receivers.known());
        let may_be_allowed = |flaw: &Flaw| [ACCEPTED_PORTS, ACCEPTED_ADDRESSES].contains(&flaw.detail.as_str());
        if !matches!(&parsed, Err(ApiError::Invalid(flaws)) if flaws.iter().any(may_be_allowed)) {
            return Ok(parsed?);
        }
        let began = Instant::now();
        let guard = receivers.asked().await.ok_or(ApiError::Unavailable)?;
        let posted = parse(&bytes, most, &guard)?;
        Ok(Self { asked_for: began.elapsed(), ..posted })
    }
}

/// Reads a body of up to `most` bytes; nothing if it has more. Some of what is too much is read and thrown away: a client that is still
/// sending when the connection closes never sees the answer.
async fn read(body: Body, most: usize) -> std::io::Result<Option<Vec<u8>>> {
    let (mut reader, mut bytes) = (body.into_async_read(), Vec::new());
    (&mut reader).take(most as u64 + 1).read_to_end(&mut bytes).await?;
    if bytes.len() <= most {
        return Ok(Some(bytes));
    }
    tokio::io::copy(&mut reader.take(THROWN_AWAY), &mut tokio::io::sink()).await?;
    Ok(None)
}

/// What a worker may be told to allow all the same.
const ACCEPTED_PORTS: &str = "accepted: the ports 80, 443, and 1024 and above";
const ACCEPTED_ADDRESSES: &str = "accepted: a name, or an address of the public internet";

fn flaw(pointer: &str, detail: impl Into<String>) -> Flaw {
    Flaw { pointer: pointer.to_owned(), detail: detail.into() }
}

/// Parses a body, or names all of its flaws. A message that is too long is told apart: it is 413.
fn parse(bytes: &[u8], most: usize, guard: &Guard) -> Result<Posted, ApiError> {
    let value: Value = serde_json::from_slice(bytes)
        .map_err(|error| ApiError::Invalid(vec![flaw("#", format!("not JSON: line {}, column {}", error.line(), error.column()))]))?;
    let Value::Object(mut fields) = value else {
        return Err(ApiError::Invalid(vec![flaw("#", "accepted: an object")]));
    };
    let mut flaws = Vec::new();
    let message =
        text(&mut fields, "message", &mut flaws, |text| if text.is_empty() { Err("accepted: at least one byte") } else { Ok(()) });
    let mut url = None;
    let posted_url = text(&mut fields, "webhookUrl", &mut flaws, |text| {
        url = Some(check_url(text, guard)?);
        Ok(())
    });
    let headers = headers(fields.remove("webhookHeaders"), &mut flaws);
    let client_request_id =
        text(&mut fields, "clientRequestId", &mut flaws, |text| if is_client_request_id(text) { Ok(()) } else { Err(CLIENT_REQUEST_ID) });
    if message.is_none() && flaws.iter().all(|flaw| flaw.pointer != "#/message") {
        flaws.push(flaw("#/message", "missing"));
    }
    for name in fields.keys() {
        flaws.push(flaw(&format!("#/{}", escaped(name)), "unknown field; accepted: message, webhookUrl, webhookHeaders, clientRequestId"));
    }
    match message {
        Some(message) if flaws.is_empty() => {
            if message.len() > most {
                return Err(ApiError::TooLarge);
            }
            let webhook = posted_url.zip(url).map(|(posted, url)| WebhookTarget::new(posted, &url, Secret::new(headers)));
            Ok(Posted { message: Message::new(message), webhook, client_request_id, asked_for: Duration::ZERO })
        }
        _ => Err(ApiError::Invalid(flaws)),
    }
}

/// Takes a field that is text. Missing is fine; of another type, or refused by `check`, is a flaw.
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
    flaws.push(flaw(&format!("#/{name}"), problem));
    None
}

/// Parses and judges the address of a receiver.
pub(super) fn check_url(text: &str, guard: &Guard) -> Result<url::Url, &'static str> {
    const ACCEPTED: &str = "accepted: an http or https address of up to 2048 characters, without credentials";
    // A URL parser drops them in silence: the address would not be the one that its author sees.
    if text.len() > LONGEST_URL || text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(ACCEPTED);
    }
    let url = canonical(url::Url::parse(text).map_err(|_| ACCEPTED)?);
    let judged = guard.check(&url).map_err(|forbidden| match forbidden {
        Forbidden::Scheme | Forbidden::Credentials => ACCEPTED,
        Forbidden::Port => ACCEPTED_PORTS,
        Forbidden::Address => ACCEPTED_ADDRESSES,
    });
    judged.map(|()| url)
}

fn headers(value: Option<Value>, flaws: &mut Vec<Flaw>) -> BTreeMap<String, String> {
    let mut headers = BTreeMap::new();
    let given = match value {
        None => return headers,
        Some(Value::Object(given)) if given.len() <= MOST_HEADERS => given,
        Some(_) => {
            flaws.push(flaw("#/webhookHeaders", format!("accepted: an object of up to {MOST_HEADERS} header names with their values")));
            return headers;
        }
    };
    for (name, value) in given {
        if let Some((name, value)) = value.as_str().and_then(|value| check_header(&name, value)) {
            // Names that differ in nothing but case are one header.
            headers.insert(name, value);
        } else {
            let accepted =
                format!("accepted: a header name of up to {LONGEST_HEADER_NAME} characters with a value of up to {LONGEST_HEADER_VALUE}");
            flaws.push(flaw(&format!("#/webhookHeaders/{}", escaped(&name)), accepted));
        }
    }
    headers
}

/// A header as it is sent, if it can be.
pub(super) fn check_header(name: &str, value: &str) -> Option<(String, String)> {
    let (header, _) = HeaderName::try_from(name).ok().zip(HeaderValue::try_from(value).ok())?;
    (name.len() <= LONGEST_HEADER_NAME && value.chars().count() <= LONGEST_HEADER_VALUE)
        .then(|| (header.as_str().to_owned(), value.to_owned()))
}

/// What a name is in a JSON pointer (RFC 6901), in a URI fragment: percent-encoded but for what may stand there (RFC 3986, 3.5).
fn escaped(name: &str) -> String {
    const ESCAPED: AsciiSet = CONTROLS
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
    utf8_percent_encode(&name.replace('~', "~0").replace('/', "~1"), &ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn guard() -> Guard {
        Guard::with_own(&shared::address_guard::AddressSettings::default(), &[])
    }

    fn pointers(body: &Value) -> Vec<String> {
        match parse(body.to_string().as_bytes(), 4096, &guard()) {
            Err(ApiError::Invalid(flaws)) => flaws.into_iter().map(|flaw| flaw.pointer).collect(),
            other => panic!("{body}: {other:?}"),
        }
    }

    #[test]
    fn every_flaw_is_named_with_its_place() {
        let body = json!({ "message": 1, "webhookUrl": "ftp://a", "clientRequestId": "\n", "webhookHeaders": { "a b": "c", "x/y": 1 }, "no~p%e": 1 });
        let expected = ["#/message", "#/webhookUrl", "#/webhookHeaders/a%20b", "#/webhookHeaders/x~1y", "#/clientRequestId", "#/no~0p%25e"];
        assert_eq!(pointers(&body), expected);
        assert_eq!(pointers(&json!({})), ["#/message"]);
        assert_eq!(pointers(&json!({ "message": "" })), ["#/message"]);
        assert_eq!(pointers(&json!({ "message": "m", "webhookUrl": null })), ["#/webhookUrl"]);
        assert_eq!(pointers(&json!(["message"])), ["#"]);
    }

    #[test]
    fn addresses_with_credentials_or_another_scheme_are_refused() {
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
            assert!(check_url(url, &guard()).is_err(), "{url}");
        }
        assert!(check_url("https://example.com:8443/hook?a=b#c", &guard()).is_ok());
    }

    #[test]
    fn a_message_is_measured_in_bytes() {
        let body = |message: String| json!({ "message": message }).to_string();
        assert!(parse(body("é".repeat(2048)).as_bytes(), 4096, &guard()).is_ok());
        assert!(matches!(parse(body("é".repeat(2049)).as_bytes(), 4096, &guard()), Err(ApiError::TooLarge)));
    }

    proptest! {
        #[test]
        fn a_message_is_kept_byte_for_byte(message in "\\PC{1,200}|[\\x00-\\x7f]{1,200}") {
            let posted = parse(json!({ "message": message }).to_string().as_bytes(), 4096, &guard()).unwrap();
            prop_assert_eq!(posted.message.text(), message);
        }

        #[test]
        fn parsing_never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes, 4096, &guard());
        }
    }
}
