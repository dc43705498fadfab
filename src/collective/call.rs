//! Argument checks and error texts that all backends share.

use tch::{Device, Kind, Tensor};

use super::{Collective, CollectiveError, Reduce};

/// Arguments of a call other than its tensor.
#[derive(Clone, Copy)]
pub(super) enum CallArgs {
    None,
    Op(Reduce),
    /// The rank that sends.
    Root(usize),
    /// The call has no tensor.
    NoTensor,
}

/// Data type for messages.
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

/// Device for messages.
pub(super) fn device_name(device: Device) -> String {
    match device {
        Device::Cpu => "the CPU".to_owned(),
        Device::Cuda(gpu) => format!("GPU {gpu}"),
        Device::Mps | Device::Vulkan => "another device".to_owned(),
    }
}

/// Name and rank of a call, for its error texts.
#[derive(Clone, Copy)]
pub(super) struct Call {
    name: &'static str,
    rank: usize,
    world_size: usize,
}

impl Call {
    pub fn new(name: &'static str, collective: &impl Collective) -> Self {
        Self { name, rank: collective.rank(), world_size: collective.world_size() }
    }

    /// Describes the call. Ranks whose descriptions differ have diverged.
    pub fn description(self, tensor: &Tensor, args: CallArgs) -> String {
        let args = match args {
            CallArgs::None => String::new(),
            CallArgs::Op(Reduce::Sum) => " (sum)".to_owned(),
            CallArgs::Op(Reduce::Min) => " (minimum)".to_owned(),
            CallArgs::Op(Reduce::Max) => " (maximum)".to_owned(),
            CallArgs::Root(root) => format!(" from rank {root}"),
            CallArgs::NoTensor => return format!("`{}`", self.name),
        };
        format!("`{}`{args} of {} {} elements", self.name, tensor.numel(), kind_name(tensor.kind()))
    }

    /// Checks that all ranks made the same call. `all` holds their descriptions in rank order.
    pub fn check_descriptions<'a>(
        self,
        local: &str,
        all: impl IntoIterator<Item = &'a str>,
    ) -> Result<(), CollectiveError> {
        match all.into_iter().enumerate().find(|(_, other)| *other != local) {
            Some((rank, other)) => {
                Err(self.refuse(format!("called {local}, but rank {rank} called {other}")))
            }
            None => Ok(()),
        }
    }

    pub fn refuse(self, problem: impl Into<String>) -> CollectiveError {
        let Self { name: call, rank, world_size } = self;
        CollectiveError::Refused { call, rank, world_size, problem: problem.into() }
    }

    /// Checks that the tensor is contiguous and of a kind that all backends support.
    pub fn check(self, tensor: &Tensor) -> Result<(), CollectiveError> {
        if !matches!(
            tensor.kind(),
            Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Int64 | Kind::Uint8
        ) {
            return Err(self.refuse(format!(
                "takes f32, f64, bf16, i64 or u8 tensors, not {}",
                kind_name(tensor.kind())
            )));
        }
        if !tensor.is_contiguous() {
            let (size, stride) = (tensor.size(), tensor.stride());
            return Err(self.refuse(format!(
                "the tensor of size {size:?}, stride {stride:?} is not contiguous"
            )));
        }
        Ok(())
    }

    /// [`check`](Self::check), and that rank `root` exists.
    pub fn check_root(self, tensor: &Tensor, root: usize) -> Result<(), CollectiveError> {
        if root >= self.world_size {
            return Err(self.refuse(format!("there is no rank {root}")));
        }
        self.check(tensor)
    }

    /// [`check`](Self::check) for both tensors. They must have one kind and one device and not
    /// overlap in memory, and `whole` must hold one part per rank.
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

    /// Copies elements in flat order, whatever the shapes, without recording gradients.
    pub fn copy(self, into: &mut Tensor, from: &Tensor) -> Result<(), CollectiveError> {
        self.torch(|| into.f_view([-1])?.f_copy_(&from.f_view([-1])?))
    }

    /// Copies the tensor to new memory.
    pub fn snapshot(self, tensor: &Tensor) -> Result<Tensor, CollectiveError> {
        self.torch(|| {
            let mut copy = tensor.f_empty_like()?;
            copy.f_copy_(tensor)?;
            Ok(copy)
        })
    }

    /// Runs tensor operations without recording gradients.
    pub fn torch<T>(
        self,
        work: impl FnOnce() -> Result<T, tch::TchError>,
    ) -> Result<T, CollectiveError> {
        let Self { name: call, rank, world_size } = self;
        tch::no_grad(work).map_err(|source| CollectiveError::Torch {
            call,
            rank,
            world_size,
            source,
        })
    }
}
