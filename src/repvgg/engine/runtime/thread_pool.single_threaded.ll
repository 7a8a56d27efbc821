; Generated from thread_pool.c by `make thread-pool-ir` with clang 16: do not edit.

%struct.thread_pool = type { i32, [60 x i8], i32, [60 x i8], ptr, i64, i64, [40 x i8], i64, [56 x i8], i64, [56 x i8], i64, i64, [48 x i8], [16 x i64], [16 x i64], [0 x i64] }
%struct.step = type { ptr, ptr, ptr, ptr, ptr, i64, i64, i64, i64, [56 x i8], i64, i64, i64, i64, [32 x i8] }

define void @pool_run(ptr %pool, ptr %steps, i64 %num_steps, i64 %batch) nounwind {
entry:
  %steps1 = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 4
  %0 = ptrtoint ptr %steps to i64
  store atomic i64 %0, ptr %steps1 monotonic, align 64
  %num_steps2 = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 5
  store atomic i64 %num_steps, ptr %num_steps2 monotonic, align 8
  %1 = load atomic i32, ptr %pool monotonic, align 64
  %add = add i32 %1, 1
  %cmp32.not = icmp eq i64 %num_steps, 0
  br i1 %cmp32.not, label %for.cond.cleanup, label %for.body.lr.ph

for.body.lr.ph:
  %conv = zext i32 %add to i64
  %shl = shl nuw i64 %conv, 32
  br label %for.body

for.cond.cleanup:
  store atomic i32 %add, ptr %pool seq_cst, align 64
  %2 = load atomic i64, ptr %steps1 seq_cst, align 64
  %3 = inttoptr i64 %2 to ptr
  %4 = load atomic i64, ptr %num_steps2 monotonic, align 8
  %num_threads.i = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 6
  %5 = load i64, ptr %num_threads.i, align 16
  %mul.i = shl i64 %5, 4
  %cond.i.i = tail call i64 @llvm.umin.i64(i64 %mul.i, i64 16384)
  %cmp49.not.i = icmp eq i64 %4, 0
  br i1 %cmp49.not.i, label %work.exit, label %for.body.i

for.body.i:
  %index.050.i = phi i64 [ %inc.i, %wait_for_step.exit.i ], [ 0, %for.cond.cleanup ]
  %arrayidx.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i
  %num_items5.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 7
  %6 = load atomic i64, ptr %num_items5.i acquire, align 8
  %items_per_block.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 6
  %7 = load i64, ptr %items_per_block.i, align 16
  %add.i.i = add i64 %6, -1
  %sub.i.i = add i64 %add.i.i, %7
  %div.i.i = udiv i64 %sub.i.i, %7
  %units_per_block.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 5
  %8 = load i64, ptr %units_per_block.i, align 8
  %mul8.i = mul i64 %8, %div.i.i
  %div.i = udiv i64 %mul8.i, %cond.i.i
  %cond.i37.i = tail call i64 @llvm.umax.i64(i64 %div.i, i64 1)
  %add.i.i.i = add i64 %mul8.i, -1
  %sub.i.i.i = add i64 %add.i.i.i, %cond.i37.i
  %div.i.i.i = udiv i64 %sub.i.i.i, %cond.i37.i
  %claims2.i.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 8
  %source.i.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 1
  %target.i.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 2
  %weights.i.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 3
  %bias.i.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 4
  %units_done.i.i = getelementptr inbounds %struct.step, ptr %3, i64 %index.050.i, i32 10
  br label %for.cond.i.i

for.cond.i.i:
  %retval.0.i.i = phi i1 [ undef, %for.body.i ], [ %retval.2.i.i, %for.cond.i.i.backedge ]
  %9 = load atomic i64, ptr %claims2.i.i acquire, align 64
  %shr.i.i.i = lshr i64 %9, 32
  %conv.i.i.i = trunc i64 %shr.i.i.i to i32
  %cmp.not.i.i = icmp eq i32 %add, %conv.i.i.i
  br i1 %cmp.not.i.i, label %if.end.i.i, label %cleanup26.i.i

if.end.i.i:
  %shr.i.i = lshr i64 %9, 16
  %and.i.i = and i64 %shr.i.i, 65535
  %and4.i.i = and i64 %9, 65535
  %add.i38.i = add nuw nsw i64 %and.i.i, %and4.i.i
  %cmp5.not.i.i = icmp ult i64 %add.i38.i, %div.i.i.i
  br i1 %cmp5.not.i.i, label %cond.end.i.i, label %cleanup26.i.i

cond.end.i.i:
  %add14.i.i = add i64 %9, 65536
  %10 = cmpxchg ptr %claims2.i.i, i64 %9, i64 %add14.i.i acq_rel acquire, align 8
  %11 = extractvalue { i64, i1 } %10, 1
  br i1 %11, label %if.end18.i.i, label %cleanup26.i.i

if.end18.i.i:
  %mul.i.i = mul i64 %and.i.i, %cond.i37.i
  %add9.i.i = add i64 %mul.i.i, %cond.i37.i
  %cond.i.i.i = tail call i64 @llvm.umin.i64(i64 %add9.i.i, i64 %mul8.i)
  %12 = load ptr, ptr %arrayidx.i, align 64
  %13 = load ptr, ptr %source.i.i, align 8
  %14 = load ptr, ptr %target.i.i, align 16
  %15 = load ptr, ptr %weights.i.i, align 8
  %16 = load ptr, ptr %bias.i.i, align 32
  tail call void %12(ptr %13, ptr %14, ptr %15, ptr %16, i64 %div.i.i, i64 %mul.i.i, i64 %cond.i.i.i)
  %sub20.i.i = sub i64 %cond.i.i.i, %mul.i.i
  %17 = atomicrmw add ptr %units_done.i.i, i64 %sub20.i.i release, align 8
  br label %cleanup26.i.i

cleanup26.i.i:
  %cleanup.dest.slot.2.i.i = phi i32 [ 1, %for.cond.i.i ], [ 1, %if.end.i.i ], [ 0, %if.end18.i.i ], [ 3, %cond.end.i.i ]
  %retval.2.i.i = phi i1 [ false, %for.cond.i.i ], [ true, %if.end.i.i ], [ %retval.0.i.i, %if.end18.i.i ], [ %retval.0.i.i, %cond.end.i.i ]
  switch i32 %cleanup.dest.slot.2.i.i, label %compute_chunks.exit.i [
    i32 0, label %for.cond.i.i.backedge
    i32 3, label %for.cond.i.i.backedge
  ]

for.cond.i.i.backedge:
  br label %for.cond.i.i

compute_chunks.exit.i:
  br i1 %retval.2.i.i, label %lor.lhs.false.i, label %work.exit

lor.lhs.false.i:
  %18 = load atomic i64, ptr %units_done.i.i acquire, align 64
  %cmp.not10.i.i = icmp eq i64 %18, %mul8.i
  br i1 %cmp.not10.i.i, label %wait_for_step.exit.i, label %for.body.i.preheader.i

for.body.i.preheader.i:
  %19 = load atomic i64, ptr %claims2.i.i acquire, align 64
  %shr.i.i4044.i = lshr i64 %19, 32
  %conv.i.i4145.i = trunc i64 %shr.i.i4044.i to i32
  %cmp3.not.i46.i = icmp eq i32 %add, %conv.i.i4145.i
  br i1 %cmp3.not.i46.i, label %if.end.i42.i, label %wait_for_step.exit.i

for.body.i.i:
  %inc.i.i = add i64 %spins.011.i47.i, 1
  %20 = load atomic i64, ptr %claims2.i.i acquire, align 64
  %shr.i.i40.i = lshr i64 %20, 32
  %conv.i.i41.i = trunc i64 %shr.i.i40.i to i32
  %cmp3.not.i.i = icmp eq i32 %add, %conv.i.i41.i
  br i1 %cmp3.not.i.i, label %if.end.i42.i, label %wait_for_step.exit.i

if.end.i42.i:
  %spins.011.i47.i = phi i64 [ %inc.i.i, %for.body.i.i ], [ 1, %for.body.i.preheader.i ]
  %rem.i.i = and i64 %spins.011.i47.i, 4095
  %cmp4.i.i = icmp eq i64 %rem.i.i, 0
  br i1 %cmp4.i.i, label %if.then5.i.i, label %for.inc.i.i

if.then5.i.i:
  %call6.i.i = tail call i32 @sched_yield()
  br label %for.inc.i.i

for.inc.i.i:
  %21 = load atomic i64, ptr %units_done.i.i acquire, align 64
  %cmp.not.i43.i = icmp eq i64 %21, %mul8.i
  br i1 %cmp.not.i43.i, label %wait_for_step.exit.i, label %for.body.i.i

wait_for_step.exit.i:
  %cmp.not.lcssa.i.i = phi i1 [ %cmp.not10.i.i, %lor.lhs.false.i ], [ false, %for.body.i.preheader.i ], [ false, %for.body.i.i ], [ %cmp.not.i43.i, %for.inc.i.i ]
  %inc.i = add nuw i64 %index.050.i, 1
  %exitcond.not.i = icmp ne i64 %inc.i, %4
  %or.cond.not.i = select i1 %cmp.not.lcssa.i.i, i1 %exitcond.not.i, i1 false
  br i1 %or.cond.not.i, label %for.body.i, label %work.exit

work.exit:
  ret void

for.body:
  %index.033 = phi i64 [ 0, %for.body.lr.ph ], [ %inc, %for.body ]
  %units_done = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 10
  store atomic i64 0, ptr %units_done monotonic, align 64
  %claims = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 8
  store atomic i64 %shl, ptr %claims release, align 64
  %first_image = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 12
  %22 = load i64, ptr %first_image, align 16
  %spec.select = tail call i64 @llvm.usub.sat.i64(i64 %batch, i64 %22)
  %max_images = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 13
  %23 = load i64, ptr %max_images, align 8
  %cond.i = tail call i64 @llvm.umin.i64(i64 %spec.select, i64 %23)
  %num_items = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 7
  %items_per_image = getelementptr inbounds %struct.step, ptr %steps, i64 %index.033, i32 11
  %24 = load i64, ptr %items_per_image, align 8
  %mul = mul i64 %cond.i, %24
  store atomic i64 %mul, ptr %num_items release, align 8
  %inc = add nuw i64 %index.033, 1
  %exitcond.not = icmp eq i64 %inc, %num_steps
  br i1 %exitcond.not, label %for.cond.cleanup, label %for.body
}

define void @pool_quiesce(ptr %pool, ptr %no_steps) nounwind {
entry:
  %steps = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 4
  %0 = ptrtoint ptr %no_steps to i64
  store atomic i64 %0, ptr %steps seq_cst, align 64
  %active_workers = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 10
  %1 = load atomic i64, ptr %active_workers seq_cst, align 64
  %cmp.not2 = icmp eq i64 %1, 0
  br i1 %cmp.not2, label %while.end, label %while.body

while.body:
  %call = tail call i32 @sched_yield()
  %2 = load atomic i64, ptr %active_workers seq_cst, align 64
  %cmp.not = icmp eq i64 %2, 0
  br i1 %cmp.not, label %while.end, label %while.body

while.end:
  ret void
}

declare i32 @sched_yield()

define void @pool_shutdown(ptr %pool) nounwind {
entry:
  %stop = getelementptr inbounds %struct.thread_pool, ptr %pool, i64 0, i32 8
  store atomic i64 1, ptr %stop seq_cst, align 64
  %0 = atomicrmw add ptr %pool, i32 1 seq_cst, align 4
  ret void
}

declare i64 @llvm.umin.i64(i64, i64)

declare i64 @llvm.umax.i64(i64, i64)

declare i64 @llvm.usub.sat.i64(i64, i64)
