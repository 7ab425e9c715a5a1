"""Ray Serve asks this which replica of the engine a call goes to (Ray's custom request routers)."""

import asyncio
from functools import partial

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from buddy_server.replicas.placement import Placement
from buddy_server.replicas.wire import VERSION


class PlacementRouter(RequestRouter):
    """Requests go where Placement wants them, and their cancellation to the same replica. If Ray Serve finds a replica
    full, the next one gets the request.

    It knows the replicas of its own version of the application alone. Of those that Ray Serve is ending, it keeps the
    ones that have requests, to cancel and observe them. While an update is under way and none but these are left of its
    version, it keeps them all, and they get new requests: until the ingress of the new version has taken over.
    """

    def initialize_state(self, version: str) -> None:
        self._version = version
        self._leaving: set[ReplicaID] = set()
        self._is_updating = False
        self._placement = Placement()
        self._names: dict[str, str] = {}
        """Ids of requests, by those of Ray Serve's calls."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        by_id = {replica.replica_id: replica for replica in candidate_replicas}
        # Where a request is to be cancelled, it is; everything else avoids replicas that leave, if there are others.
        if pending_request is None or pending_request.metadata.call_method != "cancel":
            by_id = {name: replica for name, replica in by_id.items() if name not in self._leaving} or by_id
        first = None if pending_request is None else self._first(pending_request, list(by_id))
        rest = self._placement.by_load([replica_id for replica_id in by_id if replica_id != first])
        ranks = [[by_id[replica_id]] for replica_id in rest]
        return ranks if first not in by_id else [[by_id[first]], *ranks]

    def _first(self, call: PendingRequest, replicas: list[ReplicaID]) -> ReplicaID | None:
        if call.metadata.call_method == "cancel":
            return self._placement.replica_of(call.args[0])
        if call.metadata.call_method != "generate":
            return None
        request = call.args[0]
        self._names[call.metadata.internal_request_id] = request.request_id
        # Counted from now on: calls that come together must not all see the same load.
        chosen = self._placement.place(request, replicas)
        call.future.add_done_callback(partial(self._routed, call))
        return chosen

    def _routed(self, call: PendingRequest, replica: "asyncio.Future[RunningReplica]") -> None:
        if replica.cancelled() and (name := self._names.pop(call.metadata.internal_request_id, None)) is not None:
            self._placement.release(name)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:  # noqa: ARG002
        """To another replica than wanted, if that was full."""
        if pending_request.metadata.call_method == "generate":
            request = pending_request.args[0]
            if self._placement.replica_of(request.request_id) != replica_id:
                self._placement.assign(request, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        name = self._names.get(internal_request_id)
        # A replica that refused a call, or died of it, completes it too, when another one has it already.
        if name is not None and self._placement.replica_of(name) == replica_id:
            del self._names[internal_request_id]
            self._placement.release(name)
        if replica_id in self._leaving and not self._is_needed(replica_id):
            self._drop(replica_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        running = [replica for replica in replicas if replica.replica_metadata.get(VERSION) == self._version]
        self._is_updating = not running and bool(replicas)
        names = {replica.replica_id for replica in running}
        left = [replica for name, replica in self.curr_replicas.items() if name not in names and self._is_needed(name)]
        self._leaving = {replica.replica_id for replica in left}
        super().update_replicas(running + left)
        self._placement.keep(list(self.curr_replicas))

    def _is_needed(self, leaving: ReplicaID) -> bool:
        return self._is_updating or self._placement.has_requests(leaving)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        self._drop(replica_id)

    def _drop(self, replica_id: ReplicaID) -> None:
        self._leaving.discard(replica_id)
        super().on_replica_actor_died(replica_id)
        self._placement.keep(list(self.curr_replicas))
