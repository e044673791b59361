//! Answers that take long, without what was asked.
//!
//! While an operation runs, its request, what was extracted from it and the state of every layer around it stay in memory: tens of
//! kilobytes for a caller who does nothing but wait. So an operation that has nothing left to do but to wait returns the rest as a
//! future, and the outermost layer awaits that when all the others are gone.

use std::sync::{Arc, Mutex, PoisonError};

use futures_util::future::BoxFuture;
use poem::{IntoResponse, Response};
use poem_openapi::ApiResponse;
use poem_openapi::registry::{MetaResponses, Registry};

use super::problem::ApiError;

/// An answer of the kind `A` (or a problem) that is yet to come.
pub struct Later<A>(BoxFuture<'static, Result<A, ApiError>>);

impl<A> Later<A> {
    /// The answer is what `rest` gives. It must hold no more than it needs for that.
    pub(super) fn new(rest: impl Future<Output = Result<A, ApiError>> + Send + 'static) -> Self {
        Self(Box::pin(rest))
    }
}

/// It is documented as what it becomes.
impl<A: ApiResponse> ApiResponse for Later<A> {
    fn meta() -> MetaResponses {
        A::meta()
    }

    fn register(registry: &mut Registry) {
        A::register(registry);
    }
}

/// Travels with a response that stands for the one to come. In a cell, because what travels must be cloneable.
#[derive(Clone)]
struct Rest(Arc<Mutex<Option<BoxFuture<'static, Response>>>>);

impl<A: IntoResponse + 'static> IntoResponse for Later<A> {
    fn into_response(self) -> Response {
        let rest = async move { self.0.await.map_or_else(IntoResponse::into_response, IntoResponse::into_response) };
        Response::builder().extension(Rest(Arc::new(Mutex::new(Some(Box::pin(rest)))))).finish()
    }
}

/// What `response` stands for, if it is one that is yet to come.
pub(super) fn rest_of(response: &mut Response) -> Option<BoxFuture<'static, Response>> {
    let Rest(cell) = response.extensions_mut().remove::<Rest>()?;
    cell.lock().unwrap_or_else(PoisonError::into_inner).take()
}
