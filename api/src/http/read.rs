//! Reads the body of a POST within bounds of time and length.

use std::time::Duration;

use poem::http::header;
use poem::{Body, Request};
use tokio::io::AsyncReadExt;

use super::problem::{ApiError, Flaw};

/// How long a body may take to arrive.
const READ_WITHIN: Duration = Duration::from_secs(10);

/// Maximum number of bytes of a too large body that are read and discarded, so that the client sees the answer.
const THROWN_AWAY: u64 = 64 * 1024 * 1024;

/// Reads the body of `request`.
///
/// # Errors
/// If it has more than `most` bytes, takes too long, or ends before its announced end.
pub(super) async fn read(request: &Request, body: Body, most: usize) -> Result<Vec<u8>, ApiError> {
    if is_not_worth_reading(request, most as u64) {
        return Err(ApiError::TooLarge);
    }
    match tokio::time::timeout(READ_WITHIN, read_up_to(body, most)).await {
        Ok(Ok(Some(bytes))) => Ok(bytes),
        Ok(Ok(None)) => Err(ApiError::TooLarge),
        Ok(Err(_)) => Err(ApiError::Invalid(vec![Flaw::at("#", "the body ended before its announced end")])),
        Err(_) => Err(ApiError::SlowBody),
    }
}

/// Whether the announced length is above `most`, and the client either asks before it sends the body, or would not be read to its end.
fn is_not_worth_reading(request: &Request, most: u64) -> bool {
    let announced = request.header(header::CONTENT_LENGTH).and_then(|length| length.parse().ok()).unwrap_or(0);
    announced > most.saturating_add(THROWN_AWAY) || announced > most && request.header(header::EXPECT).is_some()
}

/// Reads a body of up to `most` bytes. `None` if it is longer; some of the excess is then read and discarded, because a client that is
/// still sending when the connection closes never sees the answer.
async fn read_up_to(body: Body, most: usize) -> std::io::Result<Option<Vec<u8>>> {
    let (mut reader, mut bytes) = (body.into_async_read(), Vec::new());
    (&mut reader).take(most as u64 + 1).read_to_end(&mut bytes).await?;
    if bytes.len() <= most {
        return Ok(Some(bytes));
    }
    tokio::io::copy(&mut reader.take(THROWN_AWAY), &mut tokio::io::sink()).await?;
    Ok(None)
}
