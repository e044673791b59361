//! The rest of an answer that takes long.
//!
//! While a request is answered, the request, what was extracted from it, the state of every layer around it and the buffers of its
//! connection stay in memory: tens of kilobytes for a caller who does nothing but wait. So an endpoint that has nothing left to do but to
//! wait returns a response that stands for the rest, and the connection awaits that when all else is gone.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use poem::Response;

/// A response that is yet to come. In a cell, because what travels with a response must be cloneable.
#[derive(Clone)]
pub(crate) struct Rest(Arc<Mutex<Option<BoxFuture<'static, Response>>>>);

impl Rest {
    /// A response that stands for the one that `rest` gives. It must hold no more than it needs for that.
    pub(crate) fn response(rest: impl Future<Output = Response> + Send + 'static) -> Response {
        Response::builder().extension(Self(Arc::new(Mutex::new(Some(Box::pin(rest)))))).finish()
    }

    /// What `response` stands for, if it is one that is yet to come.
    pub(crate) fn of(response: &mut Response) -> Option<BoxFuture<'static, Response>> {
        let Self(cell) = response.extensions_mut().remove::<Self>()?;
        cell.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}
