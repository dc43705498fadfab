//! What every backend checks before it moves a byte.

use tch::{Device, Kind, Tensor};

use super::{Collective, CollectiveError, Reduce};

/// What a call says beside its tensor.
#[derive(Clone, Copy)]
pub(super) enum How {
    Plain,
    Reduce(Reduce),
    /// Sent by this rank.
    From(usize),
    /// Without a tensor.
    Barrier,
}

/// The data type as the program's messages name it.
fn kind_name(kind: Kind) -> String {
    match kind {
        Kind::Uint8 => "u8".to_owned(),
        Kind::Int64 => "i64".to_owned(),
        Kind::Float => "f32".to_owned(),
        Kind::Double => "f64".to_owned(),
        Kind::BFloat16 => "bf16".to_owned(),
        Kind::Half => "f16".to_owned(),
        Kind::Int => "i32".to_owned(),
        Kind::Bool => "bool".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

/// The device as the program's messages name it.
pub(super) fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "the CPU".to_owned(),
        Device::Cuda(gpu) => format!("GPU {gpu}"),
        Device::Mps | Device::Vulkan => "another device".to_owned(),
    }
}

/// One call as its error texts name it.
#[derive(Clone, Copy)]
pub(super) struct Call {
    name: &'static str,
    rank: usize,
    world_size: usize,
}

impl Call {
    pub fn new(name: &'static str, of: &impl Collective) -> Self {
        Self { name, rank: of.rank(), world_size: of.world_size() }
    }

    /// The call in words: ranks whose words differ have lost each other.
    pub fn words(self, tensor: &Tensor, how: How) -> String {
        let how = match how {
            How::Plain => String::new(),
            How::Reduce(Reduce::Sum) => " (sum)".to_owned(),
            How::Reduce(Reduce::Min) => " (minimum)".to_owned(),
            How::Reduce(Reduce::Max) => " (maximum)".to_owned(),
            How::From(root) => format!(" from rank {root}"),
            How::Barrier => return format!("`{}`", self.name),
        };
        format!("`{}`{how} of {} {} elements", self.name, tensor.numel(), kind_name(tensor.kind()))
    }

    /// Every rank came with the same words, here in rank order.
    pub fn check_words<'a>(
        self,
        mine: &str,
        all: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), CollectiveError> {
        match all.into_iter().enumerate().find(|(_, other)| *other != mine) {
            Some((rank, other)) => Err(self.refuse(format!("called {mine}, but rank {rank} called {other}"))),
            None => Ok(()),
        }
    }

    pub fn refuse(self, problem: impl Into<String>) -> CollectiveError {
        let Self { name: call, rank, world_size } = self;
        CollectiveError::Refused { call, rank, world_size, problem: problem.into() }
    }

    /// A contiguous tensor of a kind that every backend carries.
    pub fn check(self, tensor: &Tensor) -> Result<(), CollectiveError> {
        if !matches!(tensor.kind(), Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Int64 | Kind::Uint8) {
            return Err(self.refuse(format!(
                "takes f32, f64, bf16, i64 or u8 tensors, not {}",
                kind_name(tensor.kind())
            )));
        }
        if !tensor.is_contiguous() {
            let (size, stride) = (tensor.size(), tensor.stride());
            return Err(
                self.refuse(format!("the tensor of size {size:?}, stride {stride:?} is not contiguous"))
            );
        }
        Ok(())
    }

    /// A tensor as above, to be sent by a rank that exists.
    pub fn check_root(self, tensor: &Tensor, root: usize) -> Result<(), CollectiveError> {
        if root >= self.world_size {
            return Err(self.refuse(format!("there is no rank {root}")));
        }
        self.check(tensor)
    }

    /// `part` and `whole` are what [`check`](Self::check) asks for, of one kind, on one device, apart in
    /// memory, and `whole` holds one part of every rank.
    pub fn check_parts(self, part: &Tensor, whole: &Tensor) -> Result<(), CollectiveError> {
        self.check(part)?;
        self.check(whole)?;
        if (part.kind(), part.device()) != (whole.kind(), whole.device()) {
            return Err(self.refuse(format!(
                "the part is {} on {}, the whole {} on {}",
                kind_name(part.kind()),
                device_name(part.device()),
                kind_name(whole.kind()),
                device_name(whole.device())
            )));
        }
        if part.numel() * self.world_size != whole.numel() {
            return Err(self.refuse(format!(
                "{} parts of {} elements do not make a whole of {}",
                self.world_size,
                part.numel(),
                whole.numel()
            )));
        }
        let span = |tensor: &Tensor| {
            let start = tensor.data_ptr().addr();
            start..start + tensor.numel() * tensor.kind().elt_size_in_bytes()
        };
        let (part, whole) = (span(part), span(whole));
        if part.start < whole.end && whole.start < part.end {
            return Err(self.refuse("the part lies inside the whole, copy it first"));
        }
        Ok(())
    }

    /// Copies element by element, whatever the shapes, unseen by autograd.
    pub fn copy(self, into: &mut Tensor, from: &Tensor) -> Result<(), CollectiveError> {
        self.torch(|| into.f_view([-1])?.f_copy_(&from.f_view([-1])?))
    }

    /// The tensor's values in memory of their own.
    pub fn snapshot(self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        self.torch(|| {
            let mut copy = tensor.f_empty_like()?;
            copy.f_copy_(tensor)?;
            Ok(copy)
        })
    }

    /// Runs tensor arithmetic, unseen by autograd.
    pub fn torch<T>(self, work: impl FnOnce() -> Result<T, tch::TchError>) -> Result<T, CollectiveError> {
        let Self { name: call, rank, world_size } = self;
        tch::no_grad(work).map_err(|source| CollectiveError::Torch { call, rank, world_size, source })
    }
}
