//! A plain HTTP client for the commands that talk to the stack.

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use reqwest::{Client, ClientBuilder, RequestBuilder, StatusCode};
use serde_json::Value;

/// Builds a client; `timeout` is for a whole request.
pub(crate) fn client(timeout: Duration) -> Result<Client> {
    client_that(timeout, |builder| builder)
}

/// Builds a client with further settings.
pub(crate) fn client_that(timeout: Duration, more: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Result<Client> {
    // reqwest needs a crypto provider even if no request is encrypted. Installing one fails only if one is already installed.
    let _ = rustls::crypto::ring::default_provider().install_default();
    more(Client::builder().timeout(timeout).no_proxy()).build().context("making an HTTP client")
}

/// Sends a request and reads the response body as JSON; null if it is not JSON.
pub(crate) async fn json(request: RequestBuilder) -> Result<(StatusCode, Value)> {
    let response = request.send().await.context("no answer")?;
    let status = response.status();
    let body = response.bytes().await.context("the answer broke off")?;
    Ok((status, serde_json::from_slice(&body).unwrap_or_default()))
}

/// Fetches a JSON document of a known type.
pub(crate) async fn document<T: serde::de::DeserializeOwned>(client: &Client, url: &str) -> Result<T> {
    let (status, value) = json(client.get(url)).await.with_context(|| url.to_owned())?;
    if !status.is_success() {
        return Err(anyhow!("{url} answered {status}"));
    }
    serde_json::from_value(value).with_context(|| format!("what {url} answered"))
}

/// Returns whether a GET of the URL is answered with a success status.
pub(crate) async fn is_ready(client: &Client, url: &str) -> bool {
    client.get(url).send().await.is_ok_and(|response| response.status().is_success())
}
