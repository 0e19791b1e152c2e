//! stub
use crate::{api::problem::Code, config::Config};
#[derive(Debug, thiserror::Error)]
#[error("stub")]
pub struct Error;
impl Error {
    pub fn code(&self) -> Code {
        Code::Internal
    }
}
pub fn run(_: Config) -> Result<(), Error> {
    Err(Error)
}
