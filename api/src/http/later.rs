//! Slow answers that do not keep the request in memory: see [`Rest`].

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use poem::{IntoResponse, Response};
use poem_openapi::ApiResponse;
use poem_openapi::registry::{MetaResponses, Registry};

use super::problem::ApiError;
use crate::server::Rest;

/// An answer of type `A` (or a problem) that is yet to come. It is awaited after the operation, its request and all layers are gone.
pub struct Later<A>(BoxFuture<'static, Result<A, ApiError>>);

impl<A> Later<A> {
    /// Answers with the result of `rest`, which must hold no more than it needs for that.
    pub(super) fn new(rest: impl Future<Output = Result<A, ApiError>> + Send + 'static) -> Self {
        Self(Box::pin(rest))
    }
}

/// Documented like the answer that it becomes.
impl<A: ApiResponse> ApiResponse for Later<A> {
    fn meta() -> MetaResponses {
        A::meta()
    }

    fn register(registry: &mut Registry) {
        A::register(registry);
    }
}

impl<A: IntoResponse + 'static> IntoResponse for Later<A> {
    fn into_response(self) -> Response {
        Rest::response(self.0.map(|answered| answered.map_or_else(IntoResponse::into_response, IntoResponse::into_response)))
    }
}
