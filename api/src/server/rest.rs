//! The rest of a slow answer.
//!
//! While a request is answered, the request, what was extracted from it, the state of every layer around it and the buffers of its
//! connection stay in memory: tens of kilobytes for a caller that only waits. So an endpoint that has nothing left to do but wait returns a
//! placeholder response, and the connection awaits the rest after everything else has been dropped.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use poem::Response;

/// A response that is yet to come. In a cell, because response extensions must be cloneable.
#[derive(Clone)]
pub(crate) struct Rest(Arc<Mutex<Option<BoxFuture<'static, Response>>>>);

impl Rest {
    /// Returns a placeholder for the response that `rest` returns. `rest` must hold no more than it needs for that.
    pub(crate) fn response(rest: impl Future<Output = Response> + Send + 'static) -> Response {
        Response::builder().extension(Self(Arc::new(Mutex::new(Some(Box::pin(rest)))))).finish()
    }

    /// Takes the response that `response` is a placeholder for. `None` if it is a normal response.
    pub(crate) fn take_from(response: &mut Response) -> Option<BoxFuture<'static, Response>> {
        let Self(cell) = response.extensions_mut().remove::<Self>()?;
        cell.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
